"""Corpora: data/NAME/prepare.py makes one in data/NAME. What those scripts share lies here."""
