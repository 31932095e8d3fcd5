"""dictionary_learning: every dictionary class that it trains, saved as its trainer does, and coders of ours."""

import json

import torch
from common import D_IN, D_SAE, TOKENS, K, draw, randomize, run, store
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary

PLAIN = (AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder)
BY_K = (AutoEncoderTopK, BatchTopKSAE)


def make(folder):
    """Saves one dictionary of each class with what it makes of activations, as it is and as it is loaded again."""
    x = 1.5 * draw(TOKENS, D_IN, seed=7)
    made = [kind(D_IN, D_SAE) for kind in PLAIN] + [kind(D_IN, D_SAE, K) for kind in BY_K]
    made.append(MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [10, D_SAE - 10]))
    for dictionary in made:
        name = type(dictionary).__name__
        randomize(dictionary)
        trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 1, "lm_name": "some/model"}
        trainer |= {"k": K} if "TopK" in name else {}
        trainer["submodule_name"] = "resid_post_layer_1"
        for place, loaded in ((folder / name, False), (folder / f"{name}, loaded again", True)):
            (place / "coder").mkdir(parents=True)
            torch.save(dictionary.state_dict(), place / "coder" / "ae.pt")
            config = {"trainer": trainer, "buffer": {"ctx_len": 128, "d_submodule": D_IN}}
            (place / "coder" / "config.json").write_text(json.dumps(config))
            again = load_dictionary(str(place / "coder"), device="cpu")[0] if loaded else dictionary
            store(place, x, again.encode(x), again(x), folded=loaded and name == "AutoEncoder")


def load(folder, x):
    """What dictionary_learning makes of a coder of ours."""
    dictionary, _ = load_dictionary(str(folder), device="cpu")
    return dictionary.encode(x), dictionary(x)


if __name__ == "__main__":
    run(make, load)
