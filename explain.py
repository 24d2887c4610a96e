"""One training example, step by step, in numbers: `python pretrain.py --explain`, and the same for
contrastive.py. Nothing is trained; every number comes from the functions that train."""

import math

import torch

import contrastive
import model
import pretrain
from data import ANSWER, COMPRESS, CONTENT, HEAD, QUESTION

LETTER = {HEAD: "h", CONTENT: "x", COMPRESS: "C", QUESTION: "Q", ANSWER: "A"}


def heading(text):
    print(f"\n{text}\n{'-' * len(text)}")


def shape(name, x, note=""):
    print(f"  {name:<24} {str(tuple(x.shape)):<20} {str(x.dtype)[6:]:<10} {note}".rstrip())


class Saved:
    """Counts what autograd keeps for the backward pass while it is open, each storage once."""

    def __enter__(self):
        self.seen = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.note, lambda x: x)
        self.hooks.__enter__()
        return self

    def note(self, x):
        if not isinstance(x, torch.nn.Parameter):
            self.seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def __str__(self):
        return f"{sum(self.seen.values()) / 2**20:.1f} MiB kept for the backward pass"


# ------------------------------------------------------------------------------------------ stage 1


def stage1(embedder, dialogue, compress=True):
    """A dialogue as tokens with their roles and labels, the mask, the loss token by token."""
    embedder.eval()
    dialogue = dialogue._replace(turns=dialogue.turns[:2])  # two show it all
    heading("1. The dialogue (its first two turns)")
    for picture in dialogue.item.images:
        print("  picture:", picture.describe() if hasattr(picture, "describe") else picture)
    for question, answer in dialogue.turns:
        print(f"  Q: {question}   A: {answer}")

    row = embedder.collate.row(dialogue.item, dialogue.turns)
    inputs = embedder.collate.pad_rows([row], embedder.device)
    ids, roles = inputs["input_ids"], inputs["roles"]  # (1, L)
    labels = pretrain.answer_labels(ids, roles)  # (1, L)
    tokenizer = embedder.processor.tokenizer
    heading("2. Tokens: position, role (head, conteXt, Code, Question, Answer), what they predict")
    tokens = [repr(tokenizer.decode([i])) for i in ids[0].tolist()]
    targets = [repr(tokenizer.decode([i])) if i >= 0 else "" for i in labels[0].tolist()]
    last = None
    for i, (token, target) in enumerate(zip(tokens, targets, strict=True)):
        letter = LETTER[int(roles[0, i])]
        if (token, letter) != last:  # a picture's tokens are all alike: the first stands for them
            print(f"  {i:>3} {letter} {token:<24}" + (f"-> {target}" if target else ""))
        last = (token, letter)

    heading("3. The mask: row attends to column where there is a #")
    mask = pretrain.compression_mask(roles) if compress else None  # (1, 1, L, L)
    seen = mask[0, 0] if compress else torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    letters = "".join(LETTER[r] for r in roles[0].tolist())
    print("    " + letters)
    for i, line in enumerate(seen):
        print(f"  {letters[i]} " + "".join("#" if x else "." for x in line))

    heading("4. Through the model: L tokens, D width, n answer tokens, V vocabulary")
    for name, x in inputs.items():
        shape(name, x)
    with Saved() as saved:
        logits, labels = pretrain.answer_logits(embedder, inputs, compress)  # (n, V), (n,)
        loss = pretrain.answer_loss(logits, labels)
    shape("logits", logits, f"not {(1, ids.shape[1], logits.shape[1])}: answers only")
    print(f"  {saved}")

    heading("5. The loss: nats of each answer token, given the ones before it")
    nats = -logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]  # (n,)
    for i, x in zip(labels.tolist(), nats.tolist(), strict=True):
        print(f"  {tokenizer.decode([i])!r:<24} {x:6.3f}  p = {math.exp(-x):.3f}")
    print(f"  mean of {len(nats)}: {loss.item() / len(nats):.4f}")
    if compress:
        logits, labels = pretrain.answer_logits(embedder, inputs, False)
        other = pretrain.answer_loss(logits, labels).item() / len(labels)
        print(f"  with the mask off, the picture in view: {other:.4f}")


# ------------------------------------------------------------------------------------------ stage 2


def stage2(embedder, batch, temperature, chunk_tokens=150):
    """A small batch through GradCache: chunks, scores, cached gradients, and the check that the
    gradient is that of the whole batch."""
    embedder.eval()  # without dropout here; tests/test_gradcache.py has it
    rows, labels, keys, ids = batch.values()
    B, lengths = len(labels), model.row_lengths(rows)
    heading(f"1. The batch: {B} queries, then {len(rows) - B} targets")
    print("  pairs:", ", ".join(ids))
    print("  tokens of each row:", *lengths)
    chunks = model.token_chunks(lengths, chunk_tokens)
    heading(f"2. Chunks: sorted by length, at most {chunk_tokens} padded tokens each")
    for i, chunk in enumerate(chunks):
        padded, real = len(chunk) * max(lengths[j] for j in chunk), sum(lengths[j] for j in chunk)
        print(f"  chunk {i}: rows {chunk}: {real} tokens in {padded} places")

    def embed(chunk):
        return embedder(embedder.collate.pad_rows([rows[j] for j in chunk], embedder.device))

    heading("3. Pass 1: every embedding, without a graph")
    with Saved() as saved, torch.no_grad():
        z = torch.zeros(len(rows), embed(chunks[0]).shape[1])
        for chunk in chunks:
            z[chunk] = embed(chunk).cpu()
    shape("z", z, "unit length")
    print(f"  {saved}")

    heading("4. The loss, and its gradient with respect to the embeddings")
    q, t = z[:B].clone().requires_grad_(), z[B:].clone().requires_grad_()  # (B, D), (M, D)
    print("  cosines: row = query, column = target, * = its own")
    for i, line in enumerate((q @ t.T).tolist()):
        own = labels[i].tolist()
        print("  " + " ".join(f"{x:6.2f}{'*' if j in own else ' '}" for j, x in enumerate(line)))
    with Saved() as saved:
        loss, hits = contrastive.info_nce(q, t, temperature, labels, keys)
    loss.backward()
    dz = torch.cat([q.grad, t.grad])  # (rows, D)
    print(f"  loss {loss.item():.4f} nats (ln {len(t)} = {math.log(len(t)):.4f} by chance), "
          f"hits {hits.item():.2f}; {saved}")  # fmt: skip
    shape("dz", dz, "the cached gradient; its norms:")
    print("  " + " ".join(f"{x:.2f}" for x in dz.norm(dim=1).tolist()))

    heading("5. Pass 2: the chunks again, with a graph, one at a time")
    embedder.zero_grad(set_to_none=True)
    for i, chunk in enumerate(chunks):
        with Saved() as saved:
            part = embed(chunk)  # (chunk, D)
        part.backward(dz[chunk].to(part.device))
        grads = [p.grad for p in embedder.parameters() if p.grad is not None]
        norm = math.sqrt(sum(g.norm() ** 2 for g in grads))
        print(f"  chunk {i}: {saved}; gradient so far {norm:.4f}")
    ours = [p.grad.clone() for p in embedder.parameters() if p.grad is not None]

    heading("6. The check: the whole batch at once")
    embedder.zero_grad(set_to_none=True)
    with Saved() as saved:
        whole = embed(range(len(rows)))
        q, t = whole[:B].cpu(), whole[B:].cpu()  # where labels and keys are
        loss = contrastive.info_nce(q, t, temperature, labels, keys)[0]
    loss.backward()
    want = [p.grad for p in embedder.parameters() if p.grad is not None]
    gap = math.sqrt(sum((a - b).norm() ** 2 for a, b in zip(ours, want, strict=True)))
    size = math.sqrt(sum(b.norm() ** 2 for b in want))
    print(f"  {saved}\n  gradient {size:.4f}; the two differ by {gap / size:.1e} of it")
