"""The embedded domain: scenes, the rules that teach their chains, and the real tasks. Nobody else knows robots."""
