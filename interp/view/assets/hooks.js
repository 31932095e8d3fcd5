"use strict";
/* What a live page adds to the page of a run; in a report that opens from disk nothing does. */
const hooks = {
  tabs: [],  // {id, name, make() -> node}: beside the list of latents; the address has view=ID
  latent: [],  // {name, make({run, latent}) -> node}: on a latent's page, after its labels
  beside: [],  // ({run, latent}) -> node or null: beside a latent's number and label
  note: ({run, latent}) => explained.runs[run].notes[latent] || null,  // {label, bookmark}; on a live page as it is now
  changed: [],  // functions that are called when a note has changed
};
