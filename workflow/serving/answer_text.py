"""The text of tokens that come one by one, cut at the first stop string."""

from collections.abc import Iterable, Sequence

INCOMPLETE = "\ufffd"  # what a tokenizer writes for bytes that are no whole character
LONGEST_WAIT = 8  # tokens; a character has at most 4 bytes, so the first of them will not become one


class TokenTexts:
    """Decodes tokens one by one, so that their texts together are the text of all.

    A token that ends within a character has the text "", and the token that completes it has the whole character. The
    `DecodeStream` of tokenizers holds back bytes that never become a character for ever, and loses one that is
    unfinished at the end.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.context = 0  # where decoding begins: a tokenizer may write a token differently at the start of a text
        self.told = 0  # tokens before this one have given their text

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def text_of(self, token: int) -> str:
        """The text that `token` adds to those before it."""
        self.tokens.append(token)
        text = self._decode(self.tokens[self.context :])
        if not text.endswith(INCOMPLETE):
            return self._tell(len(self.tokens))
        return self._tell(self._unfinished(text)) if len(self.tokens) - self.told >= LONGEST_WAIT else ""

    def rest(self) -> str:
        """What an unfinished character at the end reads as."""
        return self._tell(len(self.tokens))

    def _unfinished(self, text: str) -> int:
        """Where the tokens begin that may be the first bytes of a character. `text` is that from the context on."""
        tokens = self.tokens[self.context :]
        for n in 1, 2, 3:
            if self._decode(tokens[:-n]) + self._decode(tokens[-n:]) == text:  # not where a cut divides a character
                return len(self.tokens) - n
        return len(self.tokens)

    def _tell(self, end: int) -> str:
        """The text of the tokens before `end` that have not given theirs."""
        before = self._decode(self.tokens[self.context : self.told])
        new = self._decode(self.tokens[self.context : end])[len(before) :]
        if new:  # a token without a text is no context
            self.context = self.told
        self.told = end
        return new


class AnswerText:
    """The text of an answer up to the first of its `stop` strings, in pieces that can be sent.

    Text that may be the beginning of a stop string is held back until the next tokens decide. Where `is_stopped`, the
    answer has ended: later tokens add nothing.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.texts = TokenTexts(tokenizer)
        self.stop = stop
        self.held = ""
        self.is_stopped = False
        self.num_tokens = 0  # up to the one that completed a stop string

    def add(self, tokens: Iterable[int]) -> str:
        """Text that is certain after `tokens`."""
        pieces = []
        for token in tokens:
            if self.is_stopped:
                break
            self.num_tokens += 1
            pieces.append(self._certain(self.texts.text_of(token)))
        return "".join(pieces)

    def end(self) -> str:
        """The rest of the text; no token follows."""
        if self.is_stopped:
            return ""
        text = self._certain(self.texts.rest())
        return text if self.is_stopped else text + self.held

    def _certain(self, new: str) -> str:
        if not self.stop:
            return new
        text = self.held + new
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.is_stopped, self.held = True, ""
            return text[: min(found)]
        begun = (
            n for stop in self.stop for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])
        )
        certain = len(text) - max(begun, default=0)
        self.held = text[certain:]
        return text[:certain]
