"""One training example, step by step, in numbers. Nothing is trained, nothing written (but for the
page of --html), and every number comes from the functions that train.

    python -m tools.explain pretrain                        a dialogue: tokens, roles, mask, loss
    python -m tools.explain pretrain --model out/pretrain
    python -m tools.explain contrastive                     six pairs through GradCache's two passes
    python -m tools.explain contrastive --data pairs.jsonl --image-root pictures
    python -m tools.explain --html out/explain.html         both, as a page that can be touched

The stage comes first (default: pretrain). --no-compress shows stage 1 without the mask.
"""

import plumbing.start  # noqa: F401  # signals, and --help, before torch is there
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import contrastive
import model
import pretrain
from data import ANSWER, COMPRESS, CONTENT, HEAD, QUESTION, read_dialogues, read_pairs
from plumbing.combinations import given, spelled
from plumbing.config import ModelFlags, TrainingFlags, flag
from plumbing.errors import InputError, brief
from plumbing.formats import refuse_unfit
from plumbing.graphs import graph_bytes
from plumbing.memory import token_chunks
from plumbing.ranks import run_command, say, setup
from plumbing.weights import first_model, stage_1_model, trained_model
from plumbing.writing import refuse_other, refuse_unwritable, written
from tools import explain_page
from tools.measured import InBatch, gap, gradients, kept, norm

STAGE_OF = {  # flags that only one of the walks reads
    "compress": "pretrain",
    "caption": "pretrain",
    "chunk_tokens": "contrastive",
    "temperature": "contrastive",
    "subsets": "contrastive",
}
LETTER = {HEAD: "h", CONTENT: "x", COMPRESS: "C", QUESTION: "Q", ANSWER: "A"}


@dataclass
class Config(ModelFlags):
    """Flags of both walks."""

    model: str = flag("", "empty: toy; for contrastive and --html what was trained, if anything")
    data: str = flag("shapes", "shapes (the toy world), a .jsonl, a folder or hub id like MMEB")
    image_root: str = flag("", "where the pictures are; empty: beside the data")
    seed: int = flag(0, "of the data", least=0, most=2_147_483_647)
    chunk_tokens: int = flag(
        150, "contrastive: padded tokens of a chunk; fewer: more chunks", least=1
    )
    compress: bool = flag(True, "pretrain: the compression mask; off: plain causal attention")
    caption: bool = flag(False, "pretrain: a full description in place of the dialogue (toy world)")
    temperature: float = flag(0.03, "contrastive: tau; cosines are divided by it", above=0)
    subsets: str = flag("", "contrastive: data sets, A,B,C; empty: all")
    html: str = flag("", "write both stages into this file, a page for a browser")


def heading(text):
    """The title of a step."""
    print(f"\n{text}\n{'-' * len(text)}")


def shape(name, x, note=""):
    """One tensor: its name, shape and type."""
    print(f"  {name:<24} {str(tuple(x.shape)):<20} {str(x.dtype)[6:]:<10} {note}".rstrip())


# ------------------------------------------------------------------------------------------ stage 1


def explain_pretrain(cfg, device):
    """The first dialogue, from words to the loss of each answer token."""
    cfg.model = cfg.model or "toy"
    embedder = model.load_for(cfg, device)
    model.choose_trained(embedder, TrainingFlags())  # says what training would train
    dialogues = read_dialogues(cfg.data, cfg.image_root, cfg.seed, caption=cfg.caption)
    refuse_unfit([dialogues])
    walk_dialogue(embedder, dialogues[0], cfg.compress)


def walk_dialogue(embedder, dialogue, compress):
    """A dialogue as tokens with their roles and labels, the mask, the loss token by token."""
    embedder.eval()
    compress = compress and embedder.K > 0  # as in training: without a code there is no mask
    dialogue = dialogue._replace(turns=dialogue.turns[:2])  # two show it all
    heading("1. The dialogue (its first two turns)")
    for picture in dialogue.item.images:
        print("  picture:", picture.describe() if hasattr(picture, "describe") else picture)
    for question, answer in dialogue.turns:
        print(f"  Q: {question}   A: {answer}")
    inputs = embedder.collate([dialogue.item], [dialogue.turns])
    heading(
        "2. Tokens: position, role (head, content = x, Code, Question, Answer), what they predict"
    )
    print_tokens(embedder, inputs)
    heading("3. The mask: row attends to column where there is a #")
    print_mask(inputs["roles"], compress)
    heading("4. Through the model: L tokens, D width, n answer tokens, V vocabulary")
    for name, x in inputs.items():
        shape(name, x)
    with graph_bytes() as sizes:
        logits, labels = pretrain.answer_logits(embedder, inputs, compress)  # (n, V), (n,)
        loss = pretrain.answer_loss(logits, labels)
    L, V = inputs["roles"].shape[1], logits.shape[1]
    shape("logits", logits, f"not {(1, L, V)}: answers only")
    print(f"  {kept(sizes)}")
    heading("5. The loss: nats of each answer token, given the ones before it")
    print_loss(embedder.processor.tokenizer, logits, labels, loss)
    if compress:
        logits, labels = pretrain.answer_logits(embedder, inputs, False)
        other = pretrain.answer_loss(logits, labels).item() / len(labels)
        print(f"  with the mask off, the picture in view: {other:.4f}")


def print_tokens(embedder, inputs):
    """One line a token; of a picture's tokens, which are all alike, the first stands for them."""
    ids, roles = inputs["input_ids"], inputs["roles"]  # (1, L)
    labels = pretrain.answer_labels(ids, roles)  # (1, L)
    decode, image = embedder.processor.tokenizer.decode, embedder.mllm.config.image_token_id
    last = None
    columns = torch.stack([ids[0], roles[0], labels[0]], dim=1)  # (L, 3)
    for i, (token_id, role, label) in enumerate(columns.tolist()):
        target = f"-> {decode([label])!r}" if label >= 0 else ""
        is_in_picture = token_id == image and last == image
        if not is_in_picture:
            print(f"  {i:>3} {LETTER[role]} {decode([token_id])!r:<24}{target}")
        last = token_id


def print_mask(roles, compress):
    """The mask as the function makes it, a line a row."""
    L = roles.shape[1]
    if compress:
        may = pretrain.compression_mask(roles)[0, 0]  # (L, L)
    else:
        may = torch.ones(L, L).tril().bool()
    letters = [LETTER[role] for role in roles[0].tolist()]
    print("    " + "".join(letters))
    for letter, row in zip(letters, may, strict=True):
        print(f"  {letter} " + "".join("#" if x else "." for x in row))


def print_loss(tokenizer, logits, labels, loss):
    """Nats and probability of each answer token, and their mean."""
    nats = -logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]  # (n,)
    for label, x in zip(labels.tolist(), nats.tolist(), strict=True):
        print(f"  {tokenizer.decode([label])!r:<24} {x:6.3f}  p = {math.exp(-x):.3f}")
    print(f"  mean of {len(nats)}: {loss.item() / len(nats):.4f}")


# ------------------------------------------------------------------------------------------ stage 2


def explain_contrastive(cfg, device):
    """Six pairs of two data sets, through the two passes."""
    cfg.model = cfg.model or stage_1_model()
    embedder = model.merge(model.load_for(cfg, device))  # as stage 2 does with stage 1's adapter
    model.choose_trained(embedder, TrainingFlags())  # says what training would train
    pairs = read_pairs(cfg.data, cfg.image_root, cfg.subsets, cfg.seed)
    refuse_unfit(pairs.values())
    for name, examples in pairs.items():
        say(f"  {name:<20} {len(examples):>13,} pairs")
    small = contrastive.Config(seed=cfg.seed, batch=6, block=3)
    batch = contrastive.local_batch(pairs, embedder.collate, small, 0, 0, 1)
    walk_batch(embedder, batch, cfg.temperature, cfg.chunk_tokens)


def walk_batch(embedder, batch, temperature, chunk_tokens):
    """A small batch through GradCache: chunks, scores, cached gradients, and the check that the
    gradient is that of the whole batch."""
    embedder.eval()  # without dropout here; tests/test_gradcache.py has it
    lengths, B = [row.length for row in batch.rows], len(batch.labels)
    heading(f"1. The batch: {B} queries, then {len(lengths) - B} targets")
    print("  pairs:", ", ".join(batch.ids))
    print("  tokens of each row:", *lengths)
    chunks = token_chunks(lengths, chunk_tokens)
    heading(f"2. Chunks: sorted by length, at most {chunk_tokens} padded tokens each")
    for i, chunk in enumerate(chunks):
        real = [lengths[j] for j in chunk]
        places = len(chunk) * max(real)  # shorter rows are padded
        print(f"  chunk {i}: rows {chunk}: {sum(real)} tokens in {places} places")

    heading("3. Pass 1: every embedding, without a graph")
    embedder.zero_grad(set_to_none=True)
    aloud = Aloud(embedder, batch, temperature, chunks)
    contrastive.two_passes(aloud.embed, chunks, aloud.loss_of)
    aloud.say_gradient()  # of the last chunk
    ours = [grad.clone() for grad in gradients(embedder)]  # before zero_grad takes them away

    heading("6. The check: the whole batch at once")
    embedder.zero_grad(set_to_none=True)
    with graph_bytes() as sizes:
        loss, _ = aloud.info_nce(aloud.forward(range(len(lengths))))
    loss.backward()
    want = gradients(embedder)
    print(f"  {kept(sizes)}")
    print(f"  gradient {norm(want):.4f}; the two differ by {gap(ours, want):.1e} of it")


class Aloud(InBatch):
    """What `contrastive.two_passes` calls, `embed` and `loss_of`, saying what happens as it
    happens."""

    def __init__(self, embedder, batch, temperature, chunks):
        super().__init__(embedder, batch, temperature)
        self.chunks = chunks
        self.first_pass = {}  # what it kept
        self.pending = None  # pass 2's last chunk: what it kept, until its backward pass is over

    def embed(self, chunk):
        """Pass 1 comes without a graph, pass 2 with one."""
        if not torch.is_grad_enabled():
            with graph_bytes() as sizes:
                z = self.forward(chunk)
            self.first_pass.update(sizes)
            return z
        if self.pending is None:
            heading("5. Pass 2: the chunks again, with a graph, one at a time")
        self.say_gradient()  # of the chunk before, whose graph is gone by now
        with graph_bytes() as sizes:
            z = self.forward(chunk)
        self.pending = f"  chunk {self.chunks.index(chunk)}: {kept(sizes)}"
        return z

    def loss_of(self, z):
        """Between the passes: the loss, and what it says to each embedding."""
        shape("z", z, "unit length")
        print(f"  {kept(self.first_pass)}")
        heading("4. The loss, and its gradient with respect to the embeddings")
        self.print_cosines(z.detach())
        with graph_bytes() as sizes:
            loss, hits = self.info_nce(z)
        M = len(self.batch.keys)
        chance = f"ln {M} = {math.log(M):.4f} by chance"
        print(f"  loss {loss.item():.4f} nats ({chance}), hits {hits.item():.2f}; {kept(sizes)}")
        z.register_hook(self.print_cached)  # called with d loss / d z, when it is there
        return loss

    def print_cosines(self, z):
        """Every query against every target."""
        print("  cosines: row = query, column = target, * = its own")
        B = len(self.batch.labels)
        cosines = (z[:B] @ z[B:].T).tolist()
        for row, own in zip(cosines, self.batch.labels.tolist(), strict=True):
            cells = [f"{x:6.2f}{'*' if j in own else ' '}" for j, x in enumerate(row)]
            print("  " + " ".join(cells))

    def print_cached(self, dz):
        """The gradient that GradCache keeps: (rows, D)."""
        shape("dz", dz, "the cached gradient; its norms:")
        print("  " + " ".join(f"{x:.2f}" for x in dz.norm(dim=1).tolist()))

    def say_gradient(self):
        """The chunk that has just been through its backward pass, and the gradient so far."""
        if self.pending:
            print(f"{self.pending}; gradient so far {norm(gradients(self.embedder)):.4f}")


# ----------------------------------------------------------------------------------------- the page


def is_page(path) -> bool:
    """Whether a file begins as a page does."""
    with open(path, "rb") as file:
        return file.read(100).lstrip().lower().startswith(b"<!doctype html")


def write_html(cfg, device):
    """Both stages in one file, see explain_page.py."""
    refuse_unwritable(Path(cfg.html), "--html", [cfg.data])
    refuse_other(cfg.html, "--html", is_page, "page")
    if not cfg.compress:
        raise InputError("--no-compress: the page of --html shows the mask on and off")
    first = cfg.model or first_model("out/pretrain")
    second = cfg.model or trained_model()
    stage_1 = stage_2 = model.load_for(dataclasses.replace(cfg, model=first), device)
    if second != first:
        stage_2 = model.load_for(dataclasses.replace(cfg, model=second), device)
    dialogues = read_dialogues(cfg.data, cfg.image_root, cfg.seed, caption=cfg.caption)
    pairs = read_pairs(cfg.data, cfg.image_root, cfg.subsets, cfg.seed)
    refuse_unfit([dialogues, *pairs.values()])
    models = explain_page.Models(stage_1, stage_2, (first, second))
    page = explain_page.make_page(models, dialogues[0], pairs, cfg)
    with written(Path(cfg.html), "--html") as part:
        part.write_text(page, encoding="utf-8")
    say(f"wrote {cfg.html}: {len(page) / 2**10:.0f} KiB, for any browser")


def main(argv):
    """The command line: a stage, then flags."""
    is_named = bool(argv) and not argv[0].startswith("-")
    stage, *flags = argv if is_named else ["pretrain", *argv]
    walks = {"pretrain": explain_pretrain, "contrastive": explain_contrastive}
    if stage not in walks:
        raise InputError(f"{brief(stage)}: the stage is pretrain or contrastive")
    cfg = Config.parse(flags)
    if cfg.html and is_named:
        raise InputError(f"--html shows both stages; leave {stage} out")
    for name in given(cfg):
        if not cfg.html and STAGE_OF.get(name, stage) != stage:
            raise InputError(
                f"{spelled(cfg, name)}: {stage} has none; explain {STAGE_OF[name]} has"
            )
    device = setup()
    torch.manual_seed(cfg.seed)
    if cfg.html:
        write_html(cfg, device)
    else:
        walks[stage](cfg, device)


if __name__ == "__main__":
    run_command(main)
