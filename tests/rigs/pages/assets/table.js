begin(({rows}) => table({
  label: "Latents", noun: "latents", rows: rows.id.length, key: "t", href: (i) => "#latent=" + rows.id[i],
  columns: [
    {name: "latent", title: "latent", numeric: true, values: rows.id},
    {name: "label", title: "explanation", wide: true, values: rows.label},
    {name: "score", title: "score", numeric: true, filter: "range", values: rows.score},
    {name: "status", title: "status", filter: "choice", values: rows.status},
    {name: "density", title: "density", show: (_, i) => bars([i % 5, i % 7, i % 11], ["a", "b", "c"], {small: true}), values: rows.score}],
}));
