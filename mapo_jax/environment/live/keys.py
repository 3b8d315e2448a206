"""Keys of servers: read from environment variables, checked before use, and removed from servers' texts."""

import os
import re
from collections.abc import Callable

from mapo_jax.errors import UserError

_SHORTEST = 4  # characters; a shorter key would match in any text


def read_key(variable: str) -> str | None:
    """The key in an environment variable; None if the variable is empty or not set.

    Raises:
      UserError: it cannot be a key. The message names the variable and does not quote the value.
    """
    key = os.environ.get(variable)
    if key and not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"the key in {variable} holds a space, line end or other character that no key has; set it again"
        )
    return key or None


def scrubber(key: str | None) -> Callable[[str], str]:
    """A function that replaces the key in a text by [key].

    It finds the key in upper and lower case, with characters as JSON, Python or URL escapes (so that later
    parsing does not restore it), and with stars in its middle, as OpenAI quotes a wrong key. Its time is
    linear in the length of the text.
    """
    if key is None or len(key) < _SHORTEST:
        return lambda text: text

    def spelled(character: str) -> str:
        code = f"{ord(character):02x}"
        code = "".join(f"[{digit}{digit.upper()}]" if digit.isalpha() else digit for digit in code)
        # Each alternative begins with a literal, which makes the search fast.
        ways = [re.escape(way) for way in sorted({character.lower(), character.upper()})]
        ways += [rf"\\\\{{0,7}}+(?:u00|U00|x){code}", f"%{code}"]
        if character in '"/':
            ways.append(rf"\\\\{{0,7}}+{re.escape(character)}")
        if character == "\\":
            ways[0] = r"\\{1,8}"
        return f"(?:{'|'.join(ways)})"

    whole = "".join(map(spelled, key))
    # Bounded, because a hostile text may repeat the beginning of the key many times.
    starred = "".join(map(spelled, key[:_SHORTEST])) + r"[^\s*]{0,16}+\*\S{0,300}"
    pattern = re.compile(f"{whole}|{starred}")
    return lambda text: pattern.sub("[key]", text)
