"""Arguments of the pipeline: images, edits, captions, chats, adapters."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from conftest import generators
from hostile.case import VALID, Case, cases, each
from hostile.world import World
from PIL import Image

from unified.decoding import Sampling
from unified.pipeline.editing import outpainting_canvas

NAN, INF = float("nan"), float("inf")
CODES = torch.zeros(1, 4, 4, dtype=torch.int64)


def generate(arguments: dict[str, Any]) -> Callable[[World], object]:
    return lambda w: w.pipe(**{"prompt": "red apple", "output_type": "codes", **arguments})


def of_prompt(prompt: Any) -> Callable[[World], object]:
    return generate({"prompt": prompt})


def messages(given: Any) -> Callable[[World], object]:
    return lambda w: w.pipe.chat(given, max_new_tokens=2, max_images=0)


def image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


def truncated(w: World) -> Image.Image:
    """An image that is opened and not read, of a file that is cut."""
    whole = w.fresh() / "image.png"
    w.photo.save(whole)
    return Image.open(w.file("cut.png", whole.read_bytes()[:400]))


def with_adapter(call: Callable[[World], object]) -> Callable[[World], object]:
    """With an adapter called ``a`` loaded, which is unloaded after it."""

    def run(w: World) -> None:
        w.adapter  # noqa: B018
        w.pipe.load_lora_weights(w.adapter, "a")
        try:
            call(w)
        finally:
            w.pipe.unload_lora_weights()

    return run


CASES: list[Case] = [
    *each(
        "pipeline: prompt",
        of_prompt,
        [
            ("", "prompt"),
            ("  \n", "prompt"),
            (None, "prompt None"),
            (7, "prompt 7"),
            (b"red apple", "prompt"),
            ([], "prompt []"),
            ([""], "prompt"),
            (["red apple", None], "prompt None"),
            ({"a": "red apple"}, "prompt"),
            ({"red apple"}, "prompt"),
            ([["red apple"]], "prompt"),
            (1.5, "prompt 1.5"),
            (True, "prompt True"),
            ("\ud800", "prompt Unicode"),
            ("a\udcffb", "prompt Unicode"),
            ("word " * 20000, "prompt tokens room"),
            ("x" * 100_000, "prompt tokens room"),
            (["a"] * 3 + ["\ud800" * 50_000], "prompt Unicode"),
            (np.array(["red apple"]), "prompt"),
            ("\x00\x07\x1b[31m\u202e", VALID),
            ("<boi><eoi></s><pad>", VALID),
            ("🦄" * 20, VALID),
            ("e" + "\u0301" * 30, VALID),
            (("red apple",), VALID),
            ("\ufeffred", VALID),
            ("%s{}${oc.env:HOME}", VALID),
        ],
    ),
    *each(
        "pipeline: arguments",
        generate,
        [
            ({"negative_prompt": 7}, "negative_prompt 7"),
            ({"negative_prompt": [7]}, "negative_prompt"),
            ({"negative_prompt": b"a"}, "negative_prompt"),
            ({"negative_prompt": []}, "negative_prompt 0"),
            ({"negative_prompt": ["a", "b"]}, "negative_prompt 2"),
            ({"negative_prompt": "\ud800"}, "negative_prompt Unicode"),
            ({"negative_prompt": "x" * 100_000}, "negative_prompt tokens room"),
            ({"negative_prompt": ""}, VALID),
            ({"height": 0}, "height 0"),
            ({"height": -16}, "height -16"),
            ({"height": 17}, "height 17"),
            ({"height": 32}, "height 32"),
            ({"height": 16.0}, "height 16.0"),
            ({"height": "16"}, "height 16"),
            ({"width": NAN}, "width nan"),
            ({"width": 10**9}, "width 1000000000"),
            ({"height": True}, "height True"),
            ({"height": [16]}, "height [16]"),
            ({"guidance_scale": NAN}, "guidance_scale nan"),
            ({"guidance_scale": "3"}, "guidance_scale 3"),
            ({"guidance_scale": 0}, "guidance_scale 0"),
            ({"guidance_scale": [3]}, "guidance_scale [3]"),
            ({"guidance_scale": torch.tensor(3.0)}, "guidance_scale"),
            ({"guidance_scale": np.float32(3)}, "guidance_scale 3"),
            ({"guidance_scale": 10**400}, "guidance_scale"),
            ({"guidance_schedule": lambda share: NAN}, "guidance_schedule nan"),
            ({"guidance_schedule": lambda share: -1}, "guidance_schedule -1"),
            ({"guidance_schedule": lambda share: "a"}, "guidance_schedule"),
            ({"guidance_schedule": "up"}, "guidance_schedule up"),
            ({"temperature": 0}, "temperature 0"),
            ({"temperature": NAN}, "temperature nan"),
            ({"temperature": 1e-9}, "temperature 1e-09"),
            ({"temperature": 1e308}, VALID),
            ({"top_k": -1}, "top_k -1"),
            ({"top_k": 1.5}, "top_k 1.5"),
            ({"top_k": 10**12}, VALID),
            ({"top_p": 0}, "top_p 0"),
            ({"top_p": 2}, "top_p 2"),
            ({"top_p": 1e-300}, VALID),
            ({"decoding": "fast"}, "decoding fast"),
            ({"decoding": None}, VALID),
            ({"decoding": ["plain"]}, "decoding"),
            ({"num_images_per_prompt": 0}, "num_images_per_prompt 0"),
            ({"num_images_per_prompt": 1.5}, "num_images_per_prompt 1.5"),
            ({"num_images_per_prompt": "2"}, "num_images_per_prompt 2"),
            ({"output_type": "jpg"}, "output_type jpg"),
            ({"output_type": None}, "output_type None"),
            ({"output_type": ["pil"]}, "output_type"),
            ({"output_type": np.array(["pil", "np"])}, "output_type"),
            ({"callback_on_step_end": 3}, "callback_on_step_end 3"),
            ({"generator": 7}, VALID),
            ({"generator": [7]}, VALID),
            ({"generator": []}, "generator 0"),
            ({"generator": generators(1, 2)}, "generator 2"),
            ({"generator": generators(1) * 2, "num_images_per_prompt": 2}, "generator same"),
            ({"generator": "cpu"}, "generator cpu"),
            ({"generator": {1: 2}}, "generator"),
            ({"generator": np.random.default_rng(0)}, "generator"),
            ({"known": 7}, "known int"),
            ({"known": [[[0] * 4] * 4]}, "known list"),
            ({"known": CODES.float()}, "known float32"),
            ({"known": CODES[0]}, "known (4, 4)"),
            ({"known": CODES + 20}, "known 20"),
            ({"known": CODES - 2}, "known -2"),
            ({"known": CODES.repeat(3, 1, 1)}, "known 3"),
            ({"known": CODES[:0]}, "known 0"),
            ({"known": CODES.numpy()}, "known ndarray"),
            ({"known": CODES > 0}, "known bool"),
            ({"known": CODES.to(torch.uint8)}, VALID),
            ({"known": torch.tensor(3)}, "known ()"),
            ({"known": CODES.to_sparse()}, "known"),
            ({"known": CODES.to(torch.complex64)}, "known complex64"),
        ],
    ),
    *cases(
        "pipeline: arguments",
        ("an unknown mode streamed", lambda w: next(w.pipe.stream("red apple", decoding="fast")), "decoding fast"),
        ("an unknown option streamed", lambda w: next(w.pipe.stream("red apple", steps=3)), "steps"),
        ("previews every 0", lambda w: next(w.pipe.stream("red apple", preview_every=0)), "preview_every 0"),
        ("previews every nan", lambda w: next(w.pipe.stream("red apple", preview_every=NAN)), "preview_every nan"),
        (
            "an image without mask streamed",
            lambda w: next(w.pipe.stream("red apple", image=w.photo)),
            "image mask_image keep",
        ),
        ("one prompt for two generators", lambda w: w.pipe(["car", "dog"], generator=generators(1)), "generator 1"),
    ),
    *cases(
        "pipeline: edits",
        ("no image", lambda w: w.pipe.inpaint("car", None, w.photo), "image None"),
        ("no mask", lambda w: w.pipe.inpaint("car", w.photo, None), "mask_image None"),
        ("an array", lambda w: w.pipe.inpaint("car", np.zeros((16, 16, 3)), w.photo), "image"),
        ("a path", lambda w: w.pipe.inpaint("car", "image.png", w.photo), "image image.png"),
        ("bytes", lambda w: w.pipe.inpaint("car", b"\x89PNG", w.photo), "image"),
        ("no images", lambda w: w.pipe.inpaint("car", [], []), "mask_image []"),
        ("a mask of another size", lambda w: w.pipe.inpaint("car", w.photo, image(8, 8, "L")), "mask_image 8x8"),
        ("a mask of 1 pixel", lambda w: w.pipe.inpaint("car", w.photo, image(1, 1, "L")), "mask_image 1x1"),
        ("two masks", lambda w: w.pipe.inpaint("car", w.photo, [w.photo] * 2), "mask_image 2"),
        ("two images", lambda w: w.pipe.inpaint(["a", "b", "c"], [w.photo] * 2, [w.photo] * 2), "image 2"),
        ("1 pixel", lambda w: w.pipe.variation("car", image(1, 1)), "image 1x1"),
        ("a line", lambda w: w.pipe.variation("car", image(1, 20000)), "image 20000x1"),
        ("a wide image", lambda w: w.pipe.variation("car", image(16400, 16)), "image 16x16400"),
        ("an empty image", lambda w: w.pipe.variation("car", image(0, 0)), "image 0x0"),
        ("a truncated image", lambda w: w.pipe.variation("car", truncated(w)), "image"),
        ("a truncated mask", lambda w: w.pipe.inpaint("car", w.photo, truncated(w)), "mask_image"),
        (
            "a mode of floats",
            lambda w: w.pipe.variation("car", Image.fromarray(np.full((16, 16), NAN, np.float32))),
            "finite",
        ),
        ("CMYK", lambda w: w.pipe.variation("car", image(16, 16, "CMYK")), VALID),
        ("a palette", lambda w: w.pipe.variation("car", image(16, 16, "P")), VALID),
        ("keep 1.5", lambda w: w.pipe.variation("car", w.photo, keep=1.5), "keep 1.5"),
        ("keep nan", lambda w: w.pipe.variation("car", w.photo, keep=NAN), "keep nan"),
        ("keep None", lambda w: w.pipe.variation("car", w.photo, keep=None), "keep None"),
        ("keep text", lambda w: w.pipe.variation("car", w.photo, keep="half"), "keep half"),
        ("keep 0", lambda w: w.pipe.variation("car", w.photo, keep=0), VALID),
        ("a size", lambda w: w.pipe.variation("car", w.photo, height=16), "height"),
        ("an unknown option", lambda w: w.pipe.variation("car", w.photo, strength=1), "strength"),
        ("a prompt of bytes", lambda w: w.pipe.variation(b"car", w.photo), "prompt"),
        ("a canvas that is too small", lambda w: outpainting_canvas(w.photo, 8, 8), "image 16x16"),
        ("a place outside", lambda w: outpainting_canvas(w.photo, 32, 32, top=-1), "top -1"),
        ("a place that is no number", lambda w: outpainting_canvas(w.photo, 32, 32, top="a"), "top a"),
        ("a canvas of nan", lambda w: outpainting_canvas(w.photo, NAN, 32), "height nan"),
    ),
    *cases(
        "pipeline: caption",
        ("no image", lambda w: w.pipe.caption(None), "images None"),
        ("a path", lambda w: w.pipe.caption("photo.png"), "images photo.png"),
        ("no images", lambda w: w.pipe.caption([]), "images []"),
        ("a number among images", lambda w: w.pipe.caption([w.photo, 3]), "images 3"),
        ("another size", lambda w: w.pipe.caption(image(32, 16)), "image 16x32"),
        ("1 pixel", lambda w: w.pipe.caption(image(1, 1)), "image 1x1"),
        ("a truncated image", lambda w: w.pipe.caption(truncated(w)), "image"),
        ("an empty prompt", lambda w: w.pipe.caption(w.photo, prompt=" "), "prompt"),
        ("a prompt of bytes", lambda w: w.pipe.caption(w.photo, prompt=b"a"), "prompt"),
        ("a long prompt", lambda w: w.pipe.caption(w.photo, prompt="x" * 100_000), "tokens room"),
        ("no tokens", lambda w: w.pipe.caption(w.photo, max_new_tokens=0), "max_new_tokens 0"),
        ("half a token", lambda w: w.pipe.caption(w.photo, max_new_tokens=0.5), "max_new_tokens 0.5"),
        ("a billion tokens", lambda w: w.pipe.caption(w.photo, max_new_tokens=10**9), "max_new_tokens room"),
        ("temperature 0", lambda w: w.pipe.caption(w.photo, temperature=0), "temperature 0"),
        ("top_p nan", lambda w: w.pipe.caption(w.photo, top_p=NAN), "top_p nan"),
        ("two generators", lambda w: w.pipe.caption(w.photo, generator=generators(1, 2)), "generator 2"),
    ),
    *each(
        "pipeline: chat",
        messages,
        [
            ([], "messages []"),
            (None, "messages None"),
            ("red apple", "messages red"),
            (7, "messages 7"),
            ([7], "messages 7"),
            ([""], "messages"),
            ([None], "messages None"),
            ([["red apple"], 7], "messages 7"),
            ([["red apple"], "car"], "messages car"),
            ([[]], "messages []"),
            ([b"red apple"], "messages"),
            ([{"role": "user", "content": "hi"}], "messages template"),
            ([{"role": "bot", "content": "hi"}], "messages role bot"),
            ([{"role": "user", "content": [{"type": "image"}]}], "messages image"),
            ([{"role": "user", "content": ""}], "messages nothing"),
            ([{"role": "assistant", "content": "hi"}], "messages nobody"),
            ([{"role": "user", "content": "hi"}, "hi"], "messages role None"),
            ({"role": "user"}, "messages"),
            (["red apple", ["car"]], "messages ['car']"),
            ([[["red apple"]]], "messages"),
            (["\ud800"], "messages Unicode"),
            (["x" * 100_000], "messages tokens room"),
            ([image(1, 1)], "image 1x1"),
            ([image(0, 16)], "image 16x0"),
            (iter(["a"]), "messages"),
            ([np.zeros((16, 16, 3))], "messages"),
            ([("red apple",)], VALID),
            (["<boi>"], VALID),
        ],
    ),
    *cases(
        "pipeline: chat",
        ("no tokens", lambda w: w.pipe.chat(["car"], max_new_tokens=-1), "max_new_tokens -1"),
        ("half an image", lambda w: w.pipe.chat(["car"], max_images=0.5), "max_images 0.5"),
        ("less than no image", lambda w: w.pipe.chat(["car"], max_images=-1), "max_images -1"),
        ("a billion images", lambda w: w.pipe.chat(["car"], max_images=10**9), "max_images room"),
        ("sampling by number", lambda w: w.pipe.chat(["car"], text_sampling=0.5), "text_sampling 0.5"),
        ("sampling by name", lambda w: w.pipe.chat(["car"], image_sampling={"top_k": 3}), "image_sampling"),
        ("a size of another model", lambda w: w.pipe.chat(["car"], height=32), "height 32"),
        ("a truncated image", lambda w: w.pipe.chat([truncated(w)]), "image"),
        (
            "a schedule of nan",
            lambda w: w.pipe.chat(["car"], image_sampling=Sampling(guidance_schedule=lambda s: NAN)),
            "guidance_schedule nan",
        ),
    ),
    *cases(
        "pipeline: adapters",
        ("none loaded", lambda w: w.pipe.set_adapters("a"), "adapter_names no adapter"),
        ("none to unload", lambda w: w.pipe.unload_lora_weights(), VALID),
        ("an unknown one", with_adapter(lambda w: w.pipe.set_adapters("b")), "adapter_names b"),
        ("one twice", with_adapter(lambda w: w.pipe.set_adapters(["a", "a"])), "adapter_names twice"),
        ("no name", with_adapter(lambda w: w.pipe.set_adapters([])), "adapters 0"),
        ("a number as name", with_adapter(lambda w: w.pipe.set_adapters(7)), "adapter_names 7"),
        ("a list as name", with_adapter(lambda w: w.pipe.set_adapters([["a"]])), "adapter_names"),
        ("a weight of nan", with_adapter(lambda w: w.pipe.set_adapters("a", NAN)), "weights nan"),
        ("a weight of text", with_adapter(lambda w: w.pipe.set_adapters("a", "1")), "weights 1"),
        ("a huge weight", with_adapter(lambda w: w.pipe.set_adapters("a", 10**400)), "weights"),
        ("two weights", with_adapter(lambda w: w.pipe.set_adapters("a", [1.0, 2.0])), "weights 2"),
        ("a weight of a dict", with_adapter(lambda w: w.pipe.set_adapters("a", {"a": 1})), "weights"),
        ("steered by none loaded", generate({"steer": {"a": 1.0}}), "steer a"),
        ("steered by a list", with_adapter(generate({"steer": ["a"]})), "steer a"),
        ("steered by nan", with_adapter(generate({"steer": {"a": NAN}})), "steer nan"),
        ("a scale of inf", with_adapter(lambda w: w.pipe.fuse_lora(lora_scale=INF)), "lora_scale inf"),
        ("a scale of text", with_adapter(lambda w: w.pipe.fuse_lora(lora_scale="1")), "lora_scale 1"),
        ("a scale of None", with_adapter(lambda w: w.pipe.fuse_lora(lora_scale=None)), "lora_scale None"),
        ("unfused", with_adapter(lambda w: w.pipe.unfuse_lora()), "unfuse_lora"),
        ("the last one deleted", with_adapter(lambda w: w.pipe.delete_adapters("a")), VALID),
        ("an unknown one deleted", with_adapter(lambda w: w.pipe.delete_adapters("b")), "adapter_names b"),
        ("saved with adapters", with_adapter(lambda w: w.pipe.save_pretrained(w.fresh())), "save_pretrained"),
        ("a name twice", with_adapter(lambda w: w.pipe.load_lora_weights(w.adapter, "a")), "adapter_name a"),
    ),
    *(
        Case(
            "pipeline: adapters",
            f"called {name!r}",
            lambda w, n=name: (w.adapter, w.pipe.load_lora_weights(w.adapter, n)),
            "adapter_name",
        )
        for name in ("", "a.b", "a/b", "../a", "q_proj", "keys", "a\n", 7, b"a", ["a"], "\ud800")
    ),
]
