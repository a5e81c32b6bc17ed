import nanotst  # noqa: F401 first, since it says what is missing and how to install it
