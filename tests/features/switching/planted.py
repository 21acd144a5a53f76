"""What the planted model's tokens hold: a stream in which the nearness of a switch can be read."""

import numpy as np

D, V = 32, 97


def planted_embedding() -> np.ndarray:
    """Dimension 0 says how near a switch is: the digit itself, 10 for Latin letters, 0 for what is neither. Dimension 1 is 1 throughout."""
    table = np.zeros((V, D), np.float32)
    table[:, 1] = 1
    for token in range(V):
        character = chr(token + 30)
        table[token, 0] = int(character) if character.isdecimal() else 10 * character.isalpha()
    return table


def planted_head() -> np.ndarray:
    """Latin letters are likely where dimension 0 is large, all else where dimension 1 is."""
    letters = np.array([chr(token + 30).isalpha() for token in range(V)])
    table = np.zeros((V, D), np.float32)
    table[letters, 0], table[~letters, 1] = 1.5, 2.0
    return table
