"""Corpora: data/NAME/prepare.py makes one in data/NAME. What those scripts share lies here."""

import nanotst  # noqa: F401 first, since it says what is missing and how to install it
