"""The check of a module before the first call: how its losses are computed, and what calls will cost."""
