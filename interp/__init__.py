"""Labels for the latents of a sparse coder: evidence, explanation, score.

    text -> rows with their split                corpus
    rows -> codes                                subject, codes, delphi (baselines: stand-ins for the coder)
    codes -> evidence of every latent            latents, evidence; windows (second pass)
    evidence -> what is shown of a latent        examples, decode, promotes; together: preparing
    examples -> explanations                     explainers/
    explanations -> tasks -> judgements -> score tasks, scorers/, judging, metrics, steering, tfidf
    requests -> replies                          prompts/, client/
    one latent, all latents, the run's folder    flows, pipeline, journal, rundir
    journals -> tables, files of others          results, compare, outside, neuronpedia, delphi_results

`config` says what a run is, `estimate` what it would cost, `records` holds the plain data that passes between all.
"""
