"use strict";
/* The index of a site: a link to each of its pages. Addresses are of files below it, whatever characters they hold. */

function sitePage({pages}) {
  const address = (name) => "./" + name.split("/").map(encodeURIComponent).join("/");
  const rows = pages.map(({name, title}) => el("li", {}, el("p", {}, link(address(name), title)), el("p", {class: "note"}, name)));
  return el("ul", {}, rows);
}
begin(sitePage);
