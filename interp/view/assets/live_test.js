/* On a latent's page: where this one fires on a text of one's own. */
hooks.latent.push({name: "Test a text", make: ({run, latent}) => panel("Test a text", "test", () => testPanel(run, latent))});

function testPanel(run, latent) {
  const out = el("div", {}), work = worker(() => out);
  const form = textForm("test", {label: "Where does it fire on this text?", action: "Test", rows: 2, submit: () => {
    if (!form.text()) return form.area.focus();
    work.run("Asking the model", async (signal) => {
      const found = await askJson("api/test", {latent, text: form.text(), ...(run ? {run} : {}), ...(form.chat() ? {chat: true} : {})}, signal);
      out.replaceChildren(el("p", {}, found.largest ? `Largest ${number(found.largest, 5)}, on ${number(found.values.filter(Boolean).length)} of ${number(found.values.length)} tokens.` : "It is silent there."),
        windowOf(found.runs, Math.abs(found.largest), {label: "tested text"}));
    });
  }});
  return el("div", {}, form.node, work.line, out);
}
