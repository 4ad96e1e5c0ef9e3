"""The arms of docs/claim.md that are no option of train.py: each file is one --parts of
study.compare."""
