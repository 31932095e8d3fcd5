begin((main) => el("div", {}, el("p", {}, main.text), el("p", {}, marked(main.runs, 3))));
