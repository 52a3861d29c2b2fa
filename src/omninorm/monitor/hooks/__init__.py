"""Connect the probes to a model: hooks in eager mode, operators in compiled graphs, intercepted attention."""
