"""How many mistakes that nobody thought of the suite rejects: mutants made by operators (see __main__.py)."""
