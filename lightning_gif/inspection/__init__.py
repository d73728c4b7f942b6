"""What a module is to this package, and what calls will cost, before anything is computed."""
