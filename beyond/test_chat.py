"""A question in a chat template: its tokens, the commands, what is refused."""
import pathlib

import pytest
import torch
import transformers

import adult
from adult import InputError
from beyond import attacks, finished, runs
from beyond.chat import Chat, around
from beyond.conftest import SMALL
from beyond.load import load_model
from beyond.test_beyond import command

TURN = "{{ messages[0]['content'] }}"
PLAIN = f"Be brief.\nAsked:\n{TURN}\nReply:\n"
TEMPLATES = {
    "plain": PLAIN, "stripping": PLAIN.replace("'] }}", "'] | trim }}"),
    "header": PLAIN.replace("Reply:\n", "{% if add_generation_prompt %}Reply:\n"
                                        "{% endif %}"),
    "special": f"!{TURN}!\n"}                        # "!" begins and ends, as BOS would


@pytest.fixture(scope="module")
def network():
    return load_model("tiny").model.requires_grad_(False)


@pytest.fixture()
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(adult.TINY)


@pytest.fixture()
def chatting(here, own_copy):
    """A current folder with data/, and model/ that has a chat template."""
    own_copy("model")
    (here / "model/chat_template.jinja").write_text(PLAIN)
    return here


def whole(tokenizer, text):
    """The tokens of a chat, tokenised at once by the tokenizer's own means."""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                         tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(chat, add_special_tokens=False)


# ------------------------------------------------------------------ tokens

@pytest.mark.parametrize("template", TEMPLATES)
def test_the_parts_are_the_whole_chat(template, network, tokenizer):
    """Token by token, and in what the model answers; with shots, with a prompt."""
    tokenizer.chat_template = TEMPLATES[template]
    model = Chat(network, tokenizer)
    assert [model.decode([i]) for i in model.answers] == ["0", "1"]
    person, *others = adult.load(adult.TINY).test[:3]
    shots = adult.INSTRUCTION + "".join(map(adult.shot, others))
    g = model.ids("Men earn more.")
    for text, prompt, context in (("", None, None), ("", None, shots),
                                  ("Men earn more.\n", g, shots)):
        p, = model.predict(model.questions([person]), prompt, context)
        prefix = model.prefix(prompt, context)
        for p_s, question in zip(p, adult.twins(person)):
            said = text + (context or adult.INSTRUCTION) + question
            wanted = whole(tokenizer, said)
            assert model.whole(said) == wanted
            parts = [prefix, model.embed[model.question(question)]]
            assert torch.equal(torch.cat(parts), model.embed[wanted])
            logits = network(torch.tensor([wanted])).logits[0, -1]
            two = logits[tokenizer.convert_tokens_to_ids(["0", "1"])].softmax(-1)
            assert p_s == pytest.approx(two[1].item(), abs=1e-5)


def test_a_prompt_that_the_template_changes_is_no_text(network, tokenizer):
    """Its space is stripped, or a token of its holds the newline in front as well."""
    models = {}
    for name in ("plain", "stripping"):
        tokenizer.chat_template = TEMPLATES[name]
        models[name] = Chat(network, tokenizer)
        tokenizer = transformers.AutoTokenizer.from_pretrained(adult.TINY)
    spaced, bare = models["plain"].ids(" men"), models["plain"].ids("men")
    assert attacks.survives(models["plain"], spaced)
    assert not attacks.survives(models["stripping"], spaced)
    for model in models.values():
        assert attacks.survives(model, bare)
        assert not attacks.survives(model, model.ids("label:"))


def test_the_same_on_every_day(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + PLAIN
    assert around(tokenizer)[0] == "26 Jul 2024\nBe brief.\nAsked:\n"


# ------------------------------------------------------------------ the commands

def test_a_chat_through_the_commands(chatting, capsys):
    """Trained, measured again, attacked; another template is another model."""
    command(chatting, [*SMALL, "--models", "not-trained", "robust", "--rounds", "1",
                       "--model", "model", "--chat", "--name", "chat"])
    said = capsys.readouterr().out
    assert "    Be brief.\n    Asked:\n    Predict" in said and "\n    Reply:" in said
    finished.main(["runs/chat"])
    assert "these numbers of 2 models came out again" in capsys.readouterr().out
    attacks.run(attacks.parser().parse_args(
        ["runs/chat", "--models", "robust", "--only", "gumbel", "--budget", "13",
         "--chosen-on", "4", "--test-rows", "8", "--jobs", "1"]))
    model, row, _ = finished.load_run("runs/chat", "robust")
    people = adult.split(adult.load("data"), 16, .5, 16, row["seed"]).test
    p = model.predict(model.questions(people))
    assert row["gap"] == pytest.approx(abs(p[:, 0] - p[:, 1]).mean(), abs=1e-6)
    found, = runs.read_json("runs/chat/attacks-gumbel.json")["rows"]
    question = adult.question(people[0])
    for entry in found["attacks"].values():
        ids = model.bos + model.ids(entry["prompt"]) + model.question(question)
        assert ids == whole(model.tokenizer, entry["prompt"] + question)
        p = model.predict(model.questions(people[:8]), context=entry["prompt"])
        assert entry["gap"] == pytest.approx(abs(p[:, 0] - p[:, 1]).mean(), abs=1e-6)
    pathlib.Path("model/chat_template.jinja").write_text(PLAIN.replace("brief", "kind"))
    with pytest.raises(InputError, match="another sha256"):
        finished.main(["runs/chat"])


def test_a_run_of_before_is_no_chat(chatting):
    """Its config has no such field, finished or interrupted; no template counts."""
    old = command(chatting, [*SMALL, "--models", "not-trained", "--model", "model",
                             "--name", "old"])
    assert old["config"].pop("chat") is False
    runs.write_json("runs/old/results.json", old)
    pathlib.Path("model/chat_template.jinja").write_text(PLAIN.replace("brief", "kind"))
    finished.main(["runs/old"])
    runs.write_json("run.json", {"config": {"rows": 16}})
    runs.compare(chatting, {"config": {"rows": 16, "chat": False}})
    with pytest.raises(InputError, match="another config chat"):
        runs.compare(chatting, {"config": {"rows": 16, "chat": True}})


# ------------------------------------------------------------------ what is refused

REFUSED = {
    None: "no chat template", f"{TURN} {TURN}\n": "turn 2 times",
    "Hello.\n": "turn 0 times", "{{ raise_exception('no\nuser') }}": "applied.*no user",
    "{% if %}": "cannot be applied", f"Asked:\n{TURN}\nReply: ": "no single tokens",
    PLAIN.replace("'] }}", "'].replace('\n', ' ') }}"): "changes the user's words"}


@pytest.mark.parametrize("template", REFUSED)
def test_what_cannot_be_asked_is_one_sentence(template, network, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=REFUSED[template]) as problem:
        Chat(network, tokenizer)
    said = str(problem.value)
    assert "\n" not in said and said.endswith("leave out --chat.")


@pytest.mark.parametrize("name, words, match", [
    ("ANSWERS", ("0", "0 1"), "no single tokens for '0' and '0 1' at"),
    ("ANSWERS", ("0", "0"), "no single tokens"),
    ("INSTRUCTION", "label:\n", "splits them differently")])    # "\nlabel:": one token
def test_words_that_do_not_fit_are_refused(name, words, match, network, tokenizer,
                                           monkeypatch):
    tokenizer.chat_template = PLAIN
    monkeypatch.setattr(adult, name, words)
    with pytest.raises(InputError, match=match):
        Chat(network, tokenizer)
