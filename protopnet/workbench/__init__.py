"""Experts correct a bundle by looking at its prototypes, and see at once what each decision costs.

`cache` looks at the images once; `session` holds the decisions and answers what they change; the page is in `app`.
"""
