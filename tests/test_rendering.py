"""A chat template is a stranger's program: what it may cost is limited, what it writes becomes a
right row, or one clear line."""

import copy
import json
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from checks import equal, expect
from transformers import AddedToken

from data import ANSWER, Item
from plumbing import rendering
from plumbing.errors import InputError
from plumbing.rendering import render
from plumbing.template import SpecialTokens, as_chat, read_template, starts_itself, write_prompt

CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|image_pad|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "a loop in a loop": (LOOP, "2 s"),
    "a loop that writes": (LOOP.replace("{% endfor %}", "x{% endfor %}"), "1 s|Memory"),
    "a great number": ("{{ 10 ** (10 ** 10) }}", "1 s|Memory"),
    "a long text": ("{{ 'a' * 10 ** 11 }}", "Memory"),
    "a text of two million": ("{{ 'a' * 2000000 }}", "2,000,000 characters"),
    "a range beyond the sandbox": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "a way out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "itself": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    "no jinja": ("{% for %}", "TemplateSyntaxError"),
    "a million characters": ("a" * 1_000_001, "at most 1,000,000"),
    "a number": (7, "no text"),
}


def test_a_template_runs_under_limits_of_its_own(monkeypatch):
    """No core file; two seconds of the processor, where waiting for it would take a minute; 1 GiB
    beyond what the process has already. Ctrl-C is not for it, SIGTERM ends it."""
    limits, handlers, answers = {}, {}, []
    none = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda which: (none, none))
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    request = {"template": "{{ 'a' * 3 }}", "chats": [[]], "variables": {}, "options": {}}
    rendering.render_here(json.dumps(request), SimpleNamespace(send_bytes=answers.append))
    equal(json.loads(answers[0]), [{"text": "aaa"}], "what it writes")
    memory = limits.pop(resource.RLIMIT_AS)
    equal(limits, {resource.RLIMIT_CORE: (0, 0), resource.RLIMIT_CPU: (2, 2)}, "limits")
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    expect(memory[0] == memory[1], memory, "no way to raise it", "RLIMIT_AS")
    expect(2**29 < memory[0] - has < 2**31, memory, "about 1 GiB more", "RLIMIT_AS")
    ignored = dict.fromkeys([signal.SIGINT, signal.SIGHUP], signal.SIG_IGN)
    equal(handlers, {**ignored, signal.SIGTERM: signal.SIG_DFL}, "signals")


def test_a_template_s_memory_is_below_a_limit_that_is_there(monkeypatch):
    """`ulimit -v`, as clusters set it: nobody may raise it, and it is no template's fault."""
    limits = {}
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**20, 2**20))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    request = {"template": "a", "chats": [], "variables": {}, "options": {}}
    rendering.render_here(json.dumps(request), SimpleNamespace(send_bytes=len))
    equal(limits[resource.RLIMIT_AS], (2**20, 2**20), "RLIMIT_AS")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_clear_line(name, monkeypatch):
    """It ends by itself, however it was meant; a limit far above what an honest one takes."""
    template, says = HOSTILE[name]
    if "Memory" in says:  # one that meets the limit of time is enough
        monkeypatch.setattr(rendering, "PROCESSOR_SECONDS", 1)
    with pytest.raises(InputError, match=says) as error:
        (text,) = render(template, [as_chat(["a"])], {})
        raise text if isinstance(text, InputError) else AssertionError(text)
    expect(len(str(error.value)) < 300, str(error.value), "one short line", "errors.brief")


class Processor:
    """The shared processor with another chat template."""

    image_token = "<|image_pad|>"

    def __init__(self, processor, template):
        self.tokenizer, self.chat_template = processor.tokenizer, template


def words_of(shared, template) -> str:
    """What a row with this template says: a picture, and two turns."""
    collate = type(shared.collate).__new__(type(shared.collate))
    vars(collate).update(vars(shared.collate))
    collate.template = read_template(Processor(shared.processor, template), "chat")
    row = collate.row(Item("a dog"), (("one?", "yes"), ("two?", "no")))
    expect((row.tokens["roles"] == ANSWER).any(), row, "answers", "roles")
    text = collate.tokenizer.decode(row.tokens["input_ids"])
    return text.replace("<|compress_0|><|compress_1|><|compress_2|><|compress_3|>", "CODE")


PLAIN = "U: a dog A: CODE<|im_end|> U: one? A: yes<|im_end|> U: two? A: no<|im_end|>"
KINDS = {
    "the last turn stays open": (
        "{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{{ c.text }}{% endfor %}"
        "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}",
        "<|user|>a dog<|im_end|><|assistant|>CODE<|im_end|><|user|>one?<|im_end|><|assistant|>yes"
        "<|im_end|><|user|>two?<|im_end|><|assistant|>no<|im_end|>",
    ),
    "no turn is ever closed: the tokenizer's own end does": (
        "{% for m in messages %}{{ 'U: ' if m.role == 'user' else 'A: ' }}"
        "{% for c in m.content %}{{ c.text }}{% endfor %}{{ ' ' }}{% endfor %}",
        PLAIN,
    ),
    "contents are strings": (
        "{% for m in messages %}{{ ('U: ' if m.role == 'user' else ' A: ') + m.content }}"
        "{% if m.role != 'user' %}<|im_end|> {% endif %}{% endfor %}",
        PLAIN,
    ),
    "contents are strings, and are written whatever they are": (
        "{% for m in messages %}{{ 'U: ' if m.role == 'user' else ' A: ' }}{{ m.content }}"
        "{% if m.role != 'user' %}<|im_end|> {% endif %}{% endfor %}",
        PLAIN,
    ),
    "a system prompt that nobody asked for": (
        "<|endoftext|><|user|>system\nBe good.<|im_end|>\n" + CHATML,
        "<|endoftext|><|user|>user\na dog<|im_end|>\n<|user|>assistant\nCODE<|im_end|>\n"
        "<|user|>user\none?<|im_end|>\n<|user|>assistant\nyes<|im_end|>\n"
        "<|user|>user\ntwo?<|im_end|>\n<|user|>assistant\nno<|im_end|>",
    ),
    "a blank before the end": (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content[-1].text }}"
        "{% else %}<|assistant|>{{ m.content[0].text + ' <|im_end|>' }}{% endif %}{% endfor %}",
        "<|user|>a dog<|assistant|>CODE <|im_end|><|user|>one?<|assistant|>yes <|im_end|>"
        "<|user|>two?<|assistant|>no <|im_end|>",
    ),
    "several templates": ({"tool_use": "x", "default": CHATML}, None),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_template_of_another_kind_makes_a_right_row(shared, name):
    """What the row says, in words; of several templates the default."""
    template, want = KINDS[name]
    equal(words_of(shared, template), want or words_of(shared, CHATML), name)


def test_a_prompt_ends_where_the_assistant_begins(shared):
    """What a model is asked with; a template that fails is a clear line."""
    opening = "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
    chat = [{"role": "user", "content": [{"type": "text", "text": "a dog"}]}]
    got = write_prompt(Processor(shared.processor, CHATML + opening), chat)
    equal(got, "<|user|>user\na dog<|im_end|>\n<|user|>assistant\n", "add_generation_prompt")
    with pytest.raises(InputError, match="the chat template: .*no dogs"):
        write_prompt(Processor(shared.processor, "{{ raise_exception('no dogs') }}"), chat)


@pytest.mark.parametrize(
    ("start", "prompt", "want"),
    [("<s>", "<s>a", True), ("<s>", "a<s>", False), ("<s>", "", False), (None, "a", False)],
)
def test_a_tokenizers_first_token_is_written_once(start, prompt, want):
    """By the template or by the tokenizer."""
    processor = SimpleNamespace(tokenizer=SimpleNamespace(bos_token=start))
    equal(starts_itself(processor, prompt), want, prompt)


def test_a_text_is_cut_at_its_special_tokens(shared):
    """The longest one that stands there, with the white space that it swallows; an added word that
    is no special token is text."""
    tokenizer = copy.deepcopy(shared.processor.tokenizer)
    tokenizer.add_tokens(["dog"])
    tokens = [AddedToken("<s>"), AddedToken("<s>!"), AddedToken("<left>", lstrip=True)]
    tokens.append(AddedToken("<right>", rstrip=True))
    tokenizer.add_tokens(tokens, special_tokens=True)
    special = SpecialTokens(SimpleNamespace(tokenizer=tokenizer, image_token="<|image_pad|>"))
    equal("dog" in special.names_of_ids.values(), False, "t.special")
    expect(special.behind not in ("<left>", "<right>", ""), special.behind, "one that swallows", "")
    for text, first, behind, last, start in (
        ("a<s>!b<s>c", ("a", "<s>!b<s>c"), ("a<s>!", "b<s>c"), ("a<s>!b<s>", "c"), ""),
        ("a  <left> b", ("a", "  <left> b"), ("a  <left>", " b"), ("a  <left>", " b"), ""),
        ("a <right> b", ("a ", "<right> b"), ("a <right> ", "b"), ("a <right> ", "b"), ""),
        ("<s><s>!<s>b", ("", "<s><s>!<s>b"), ("<s>", "<s>!<s>b"), ("<s><s>!<s>", "b"), "<s><s>!"),
        ("a dog", ("a dog", ""), ("", "a dog"), ("", "a dog"), ""),
    ):
        equal(special.cut_before_first(text), first, text)
        equal(special.cut_behind_first(text), behind, text)
        equal(special.cut_behind_last(text), last, text)
        equal(special.start_of(text), start, text)


def test_a_template_without_pictures_leaves_them_to_the_processors_token(shared):
    """Where the template writes nothing for a picture, the text holds the processor's own mark."""
    blind = CHATML.replace("<|image_pad|>", "")
    for template in (blind, "{% for m in messages %}<|user|>{{ m.content + '' }}{% endfor %}"):
        got = read_template(Processor(shared.processor, template), "chat").picture
        equal(got, Processor.image_token, template)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("", "no chat template"),
        ({"tool_use": CHATML}, "no chat template"),
        ("hello", "writes 'hello' for four turns"),
        ("{% for m in messages[:1] %}" + CHATML + "{% endfor %}{{ messages }}", "four turns"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages[0].content[0].text }}", "each must stand in it once"),
        (CHATML + CHATML, "each must stand in it once"),
    ],
)
def test_a_template_that_is_of_no_use_is_one_clear_line(shared, monkeypatch, template, says):
    """It loses the words, says them twice, or refuses them."""
    bare = Processor(shared.processor, template)
    monkeypatch.setattr(bare.tokenizer, "chat_template", None)
    with pytest.raises(InputError, match=says):
        read_template(bare, "chat")
