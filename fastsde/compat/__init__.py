"""Drop-in stand-ins for the functions of other code bases."""
