"""A picture's tokens are remembered by its size, and nobody can tell: what comes out is what the
processor writes, in every family. And how the tensors of several pictures become one."""

import families
import pytest
import torch
from checks import equal, expect
from PIL import Image

from data import Collator
from plumbing import images
from plumbing.families import load_processor
from plumbing.images import PictureEncoder, cat_padded, encode_picture

SIZES = ((64, 64), (100, 60), (60, 100), (280, 70))


@pytest.fixture(scope="module", params=families.FAMILIES)
def collate(request, tmp_path_factory):
    """A Collator of the family, without a model."""
    folder = tmp_path_factory.mktemp(request.param)
    spec = families.BUILDERS[request.param]()
    tokenizer = families.tokenizer(spec, "bytes")
    families.write_processor(spec, tokenizer, folder)
    return Collator(load_processor(folder, families.configured(spec, tokenizer)))


@pytest.fixture
def whole_calls(monkeypatch):
    """The sizes of the pictures that went through the whole processor."""
    sizes, ours = [], encode_picture

    def noted(processor, marker, image):
        sizes.append(image.size)
        return ours(processor, marker, image)

    monkeypatch.setattr(images, "encode_picture", noted)
    return sizes


def noise(size, seed) -> Image.Image:
    """Pictures of one size differ in every pixel."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def check(encoder, picture, hint):
    """What it makes is what the processor makes of this picture."""
    want, got = encode_picture(encoder.processor, encoder.marker, picture), encoder(picture)
    equal(got.columns, want.columns, hint)
    equal(list(got.images), list(want.images), hint)
    for key, tensor in want.images.items():
        expect(torch.equal(got.images[key], tensor), got.images[key], tensor, f"{hint}: {key}")
        equal(got.images[key].dtype, tensor.dtype, f"{hint}: {key}")


def test_every_familys_pictures_are_as_its_processor_writes_them(collate, whole_calls):
    """Square, wide, high and stretched ones, in turn; and from a size's third picture on the image
    processor alone is asked (64 x 64 has come once before)."""
    encoder = PictureEncoder(collate.encode_picture.processor, collate.template.picture)
    equal(whole_calls, [(64, 64)], "one picture shows the family's columns")
    for seed in range(4):
        for size in SIZES:
            check(encoder, noise(size, seed), f"{size}, number {seed}")
    counts = {size: whole_calls.count(size) for size in SIZES}
    equal(counts, dict.fromkeys(SIZES, 2), "twice through the whole processor, and no more")


class Processor:
    """Its image processor doubles a picture's first pixel; inside it the factor may be another."""

    def __init__(self, inside=2):
        self.inside, self.size = inside, 3

    def image_processor(self, images, return_tensors, factor=2):
        first = float(factor * images[0].getpixel((0, 0))[0])
        return {"rows": torch.ones(1), "pixel_values": torch.full((1, self.size), first)}

    def __call__(self, text, images, **_):
        made = self.image_processor(images, "pt", self.inside)
        ids = torch.full((1, self.size), 7)
        return {"input_ids": ids, "pixel_values": made["pixel_values"]}


def red(n) -> Image.Image:
    return Image.new("RGB", (5, 5), (n, 0, 0))


def test_an_image_processor_that_has_other_settings_alone_is_never_asked_alone(whole_calls):
    """The processor's own tensors, for the fourth picture too."""
    for inside, whole in ((2, 2), (3, 4)):
        encoder = PictureEncoder(Processor(inside), "")
        whole_calls.clear()
        for n in range(4):
            check(encoder, red(n + 1), f"factor {inside}")
        equal(len(whole_calls), whole, f"factor {inside}")


def test_other_settings_from_now_on_make_other_pictures():
    """A remembered size is no size any more where its tensors have another shape."""
    processor = Processor()
    encoder = PictureEncoder(processor, "")
    for n in range(3):
        check(encoder, red(n), "as it was")
    processor.size = 4
    for n in range(3):
        check(encoder, red(n), "as it is")


def test_no_more_than_so_many_sizes_are_remembered(monkeypatch):
    """A data set may have a hundred thousand."""
    monkeypatch.setattr(images, "MOST_SIZES", 4)
    encoder = PictureEncoder(Processor(), "")
    for n in range(5, 15):
        for number in range(3):
            check(encoder, Image.new("RGB", (n, 5), (n, 0, 0)), f"{n}")
            expect(len(encoder.times) <= 4, len(encoder.times), "at most 4", "MOST_SIZES")
            expect(number < 1 or 1 <= len(encoder.known) <= 4, encoder.known, "1 to 4", "forgotten")


def test_tensors_stand_end_to_end_and_smaller_ones_have_zeros_behind_them():
    """One is not copied; equal ones; ones that differ in each of their other axes."""
    one = torch.rand(2, 3, 4)
    expect(cat_padded([one]) is one, "a copy", "itself", "pictures are large")
    others = [torch.rand(2, 3, 4), torch.rand(1, 3, 4)]
    equal(cat_padded([one, *others]), torch.cat([one, *others]), "equal shapes")
    small, narrow = torch.rand(1, 2, 4), torch.rand(3, 3, 1)
    want = torch.zeros(6, 3, 4)
    want[:2], want[2:3, :2], want[3:, :, :1] = one, small, narrow
    equal(cat_padded([one, small, narrow]), want, "zeros")


class WithSizes(Processor):
    """The whole processor also says the sizes, which its image processor alone does not."""

    def __call__(self, text, images, **_):
        return super().__call__(text, images) | {"sizes": torch.tensor([images[0].size])}


def test_an_image_processor_that_says_less_alone_is_never_asked_alone():
    """For the fourth picture too the model has all tensors."""
    encoder = PictureEncoder(WithSizes(), "")
    for n in range(4):
        check(encoder, red(n + 1), "sizes")
        equal(sorted(encoder(red(n + 1)).images), ["pixel_values", "sizes"], f"picture {n}")
