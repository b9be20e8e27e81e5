"""Our solvers inside other libraries: a module a library, imported by who uses both."""
