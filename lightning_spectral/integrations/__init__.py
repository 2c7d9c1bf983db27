"""The same in the loops of other frameworks: each file imports its framework, and nobody imports the file unasked."""
