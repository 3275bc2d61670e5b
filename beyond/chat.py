"""NOT IN THE PAPER: the question as a user's turn in the tokenizer's chat template.

    before     what the template writes in front of a user's turn: BOS, a system message
    the turn   g   newline   context   question
    after      the end of the turn, and the header of the reply
    answer     the first token of the reply: "0" or "1", no space in front, unlike the
               shots' answers, which stand in the turn

    python train.py --model smollm2 --chat
"""
import adult
from adult import InputError
from faircon import LanguageModel

# Some templates write today's date; a fixed one keeps a run reproducible.
DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro +%}"


class Chat(LanguageModel):
    """LanguageModel that asks in a chat. InputError where the template rules it out."""

    def __init__(self, model, tokenizer):
        self.before, self.after = around(tokenizer)
        super().__init__(model, tokenizer)

    def beginning(self):
        return self.ids(self.before)

    def question(self, text):
        return self.ids(text + self.after)

    def whole(self, text):
        return self.ids(templated(self.tokenizer, text))

    def answer_tokens(self):
        """The two tokens that begin a reply; InputError if there are none."""
        text = f"{adult.OPENING} sex Male\nlabel:"
        question = self.question(text)
        no, yes = [self.ids(text + self.after + word) for word in adult.ANSWERS]
        if no[:-1] != question or yes[:-1] != question or no == yes:
            words = " and ".join(map(repr, adult.ANSWERS))
            raise InputError(f"the tokenizer has no single tokens for {words} at the "
                             "beginning of a reply; leave out --chat.")
        shots = f"{adult.INSTRUCTION}{text} {adult.ANSWERS[0]}\n"
        prompts = {adult.INSTRUCTION: self.ids(adult.INSTRUCTION),
                   "x\n" + shots: self.ids("x") + self.ids("\n") + self.ids(shots)}
        for prompt, ids in prompts.items():
            if self.whole(prompt + text) != self.bos + ids + question:
                raise InputError("the chat template changes the user's words, or the "
                                 "tokenizer splits them differently in it; leave out "
                                 "--chat.")
        return [no[-1], yes[-1]]


def around(tokenizer):
    """-> the texts before and after a user's turn. Raises InputError."""
    turn = "a user's turn"
    parts = templated(tokenizer, turn).split(turn)
    if len(parts) != 2:
        raise InputError(f"the chat template writes a user's turn {len(parts) - 1} "
                         "times, and not once; leave out --chat.")
    return parts


def templated(tokenizer, text):
    """A user's turn in the template, up to the reply. Raises InputError."""
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; leave out --chat.")
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False,
            chat_template=DAY + tokenizer.get_chat_template(),
            add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # noqa: BLE001  a template is a program
        said = " ".join(str(error).split())
        raise InputError("the chat template cannot be applied "
                         f"({type(error).__name__}: {said[:100]}); leave out "
                         "--chat.") from None
