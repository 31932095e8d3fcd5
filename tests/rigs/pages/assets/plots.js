begin(({series, counts, labels, points, options}) => el("div", {class: "plots"},
  lines(series, options),
  bars(counts, labels, {title: "Density", x: "share of tokens a latent fires on, at least", y: "latents", apart: [0]}),
  scatter(points, {title: "FVU against L0", x: "L0", y: "FVU (log)", log: "y", front: "low"})));
