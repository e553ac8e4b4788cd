"""The laboratory: every statement of the papers as a function, checked, with its counterexample."""
