"""The page of an explained run that asks its model, and the same model steered for clients of OpenAI's protocol.

server       a socket, uvicorn, and how both end
app          which address does what
guards       who may ask: hosts, origins, tokens, pace, bodies; an answer that leaks nothing
turns        one thread for the model, a step for each in turn
panels       what the page asks: prompts, one latent on a text, search, steering, notes
completions  OpenAI's protocol: asked (a request, checked), written (tokens, texts, log-probabilities)
served       a coder with its model and its run, if there is one, and what they write
"""
