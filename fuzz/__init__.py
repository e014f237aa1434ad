"""Coverage-guided fuzzing of open → scan → sanitize: `python -m fuzz`.

`trial` is one input and the laws that it must hold; `seeds` are the models to begin with; `worker` is the process that
libFuzzer drives through atheris; `__main__` starts it, starts it anew where an input killed it, and says what came out.
"""
