begin(explainedPage);
