"""Where the architectures are: a module for each kind, which exports `ARCHITECTURES: tuple[Architecture, ...]`."""
