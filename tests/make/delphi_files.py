"""Makes tests/golden/delphi: a cache, explanations and scores as EleutherAI's delphi writes them.

Run by eai-delphi 0.1.3 with torch 2.13.0, transformers 4.57.3 (under 5 its windows lose their tokens), tokenizers
0.22.1, datasets 4.4.1, safetensors 0.8.0, orjson 3.13.0, numpy 2.4.6, Python 3.11, no GPU: after
`pip install torch==2.13.0`, with `pip install --no-deps`, eai-delphi, eai-sparsify and what these import; then
`python tests/make/delphi_files.py`. Everything on disk is written by delphi's own code:

- the cache by `LatentCache.run`, `save_splits` and `save_config` on a random GPT-NeoX of 2 layers; the one in wide/,
  with locations in uint16 and uint32, by `InMemoryCache.add` and the same saving;
- explanations and scores by `delphi.__main__.process_cache`, with its loader, explainer, scorers and pipeline. What
  stands in: vllm, faiss and sentence_transformers, imports that are never called, and the client, whose answers are
  canned. Some of them fail;
- run_config.json by `RunConfig.save_json`.
"""

import asyncio
import json
import random
import shutil
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import GPTNeoXConfig, GPTNeoXModel, PreTrainedTokenizerFast

HERE = Path(__file__).parents[1] / "golden" / "delphi"
UNUSED = {
    "faiss": (),
    "sentence_transformers": ("SentenceTransformer",),
    "vllm": ("LLM", "SamplingParams"),
    "vllm.distributed": (),
    "vllm.distributed.parallel_state": ("destroy_distributed_environment", "destroy_model_parallel"),
    "vllm.inputs": ("TokensPrompt",),
}
for module, names in UNUSED.items():
    sys.modules[module] = types.ModuleType(module)
    sys.modules[module].__spec__ = ModuleSpec(module, None)
    for name in names:
        setattr(sys.modules[module], name, type(name, (), {}))

import delphi.__main__ as delphi  # noqa: E402
from delphi.clients.client import Client, Response  # noqa: E402
from delphi.clients.offline import Logprobs, Top_Logprob  # noqa: E402
from delphi.config import CacheConfig, ConstructorConfig, RunConfig, SamplerConfig  # noqa: E402
from delphi.latents import LatentCache  # noqa: E402
from delphi.latents.neighbours import NeighbourCalculator  # noqa: E402

HOOK, ROWS, CONTEXT, D_SAE = "layers.1.mlp", 16, 48, 40
WORDS = [" the", " cat", " sat", "<<", ">>", "\n", "é", '"', "</script>", " 猫"]
VOCABULARY = WORDS + [f" w{i}" for i in range(64 - len(WORDS))]
EXPLAINED = (3, 17, 30)


class Canned(Client):
    """Answers as a model might: mostly well, sometimes not at all, once in prose, once with too few answers."""

    def __init__(self, model: str, api_key: str | None = None) -> None:
        super().__init__(model)
        self.random = random.Random(0)
        self.asked = {"explain": 0, "simulate": 0, "classify": 0}

    async def generate(self, prompt, **options) -> Response:
        question = prompt[-1]["content"]
        classifies = question.startswith("Latent explanation:")
        kind = "classify" if classifies else "simulate" if "max_tokens" in options else "explain"
        self.asked[kind] += 1
        return getattr(self, kind)(question, self.asked[kind])

    def explain(self, prompt: str, number: int) -> Response:
        if number == len(EXPLAINED):
            return Response("I do not see what these have in common.")
        return Response(f'They share a word.\n[EXPLANATION]: The word number {number}, "quoted" and <b>é</b>.')

    def classify(self, prompt: str, number: int) -> Response:
        if number == 2:
            raise TimeoutError("no answer")
        if number == 5:
            return Response("The first and the third.")
        shown = sum(line.startswith("Example ") for line in prompt.splitlines())
        logprobs = [self.chosen() for _ in range(shown)]
        if number == 3:  # neither 0 nor 1 is among the most probable tokens of the first answer
            logprobs[0] = Logprobs("1", [Top_Logprob("yes", -0.1)])
        return Response(f"[{', '.join(one.token for one in logprobs)}]", logprobs)

    def chosen(self) -> Logprobs:
        answer, p = self.random.randint(0, 1), self.random.uniform(0.55, 0.95)
        sure, other = torch.tensor([p, 1 - p]).log().tolist()
        return Logprobs(str(answer), [Top_Logprob(str(answer), sure), Top_Logprob(str(1 - answer), other)])

    def simulate(self, prompt: str, number: int) -> Response:
        if number == 2:
            raise TimeoutError("no answer")
        asked = json.loads(prompt)
        for place, entry in enumerate(asked["activations"]):
            entry["activation"] = 0 if number == 3 else (place * 7 + number) % 11
        return Response("{" if number == 4 else json.dumps(asked))


def cached(folder: Path) -> None:
    """The cache of one hookpoint, in three shards."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = GPTNeoXConfig(vocab_size=64, max_position_embeddings=CONTEXT, **sizes)
    model, weights = GPTNeoXModel(config).eval(), torch.randn(16, D_SAE)

    def encode(x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean((0, 1))) / x.std((0, 1)) @ weights
        threshold = x.flatten(0, 1).quantile(0.96, dim=0)
        return torch.relu(x - threshold)

    cache = LatentCache(model, {HOOK: encode}, batch_size=8)
    tokens = torch.randint(64, (ROWS + 3, CONTEXT))  # the last batch is not full: delphi drops it
    cache.run(tokens.numel(), tokens)
    cache.save_splits(n_splits=3, save_dir=folder)
    settings = CacheConfig("some/texts", "train[:1%]", "", "text", 8, CONTEXT, tokens.numel(), 3)
    cache.save_config(folder, settings, "some/model")


def wide(folder: Path) -> None:
    """A cache of 140,000 latents in two shards. One of the second is so far from its start that uint16 is too small."""
    cache, tokens = LatentCache(None, {}, batch_size=2), torch.randint(64, (4, 8))
    cache.width = 140_000
    for batch in range(2):
        latents = torch.zeros(2, 8, cache.width)
        latents[0, 1, [5, 65_535, 70_001]] = torch.tensor([1.5, 2.5, 3.5])
        latents[1, 7, [65_000, 139_999]] = torch.tensor([0.25 + batch, 4.5])
        cache.cache.add(latents, tokens[2 * batch : 2 * batch + 2], batch, "layers.0")
    cache.cache.save()
    cache.save_splits(n_splits=2, save_dir=folder)
    cache.save_config(folder, CacheConfig("some/texts", n_tokens=32, cache_ctx_len=8, n_splits=2), "some/model")


def ran(folder: Path, source: str, latents: tuple[int, ...], *scorers: str, fuzz_type: str = "default") -> None:
    """Explanations and scores of some latents of the cache."""
    config = RunConfig(
        cache_cfg=CacheConfig(cache_ctx_len=CONTEXT, n_splits=3),
        constructor_cfg=ConstructorConfig(
            example_ctx_len=8, min_examples=10, n_non_activating=8, non_activating_source=source
        ),
        sampler_cfg=SamplerConfig(n_examples_train=10, n_examples_test=10),
        model="some/model",
        sparse_model="some/coder",
        hookpoints=[HOOK],
        explainer_model="some/judge",
        explainer_provider="openrouter",
        scorers=list(scorers),
        fuzz_type=fuzz_type,
        log_probs=source == "random",
        pipeline_num_proc=1,
        num_gpus=0,
        verbose=False,
    )
    config.save_json(folder / "run_config.json", indent=4)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=" the"))
    )
    paths = (folder / "latents", folder / "explanations", folder / "scores")
    asyncio.run(delphi.process_cache(config, *paths, [HOOK], tokenizer, torch.tensor(latents)))


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    delphi.OpenRouter = Canned
    delphi.os.environ["OPENROUTER_API_KEY"] = "none"  # only asked whether it is there
    run, other = HERE / "run", HERE / "neighbours"
    cached(run / "latents")
    wide(HERE / "wide")
    ran(run, "random", EXPLAINED[1:2], "simulation")
    ran(run, "random", EXPLAINED, "detection", "fuzz")
    # Neighbors of a latent by number, with similarities. As delphi 0.1.3 reads the pairs the wrong way round, those of
    # similarity 0 alone give windows: latent 0's.
    (other / "neighbours").mkdir(parents=True)
    calculator = NeighbourCalculator(neighbour_cache={i: [((i + 1) % D_SAE, 0.5), (7, 0.0)] for i in range(D_SAE)})
    calculator.method = "co-occurrence"
    calculator.save_neighbour_cache(f"{other / 'neighbours' / HOOK}")
    shutil.copytree(run / "latents", other / "latents")
    ran(other, "neighbours", EXPLAINED[:1], "detection", "fuzz", fuzz_type="active")
    shutil.rmtree(other / "latents")
    shutil.rmtree(other / "neighbours")


if __name__ == "__main__":
    main()
