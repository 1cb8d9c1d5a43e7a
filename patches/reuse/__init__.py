"""A feature cache: values that one step has computed and later ones reuse. Knows no technique and no model family."""
