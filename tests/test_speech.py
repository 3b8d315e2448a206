import pytest

from mapo_jax.speech import spoken, text_of


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Hello.", "Hello."),
        (" as it is\n", " as it is\n"),
        ("", ""),
        (None, None),
        ("<think>\nHm.\n</think>\n\nHello.", "Hello."),
        ("<think></think>Hello.", "Hello."),
        ("Hm.</think>Hello.", "Hello."),  # the prompt opened the block
        ("<think>a</think>Hello<think>b</think>.", "Hello."),
        ("<think>The tag <think> opens.</think>Hello.", "Hello."),
        ("<think>The tag </think> closes.</think>Hello.", "Hello."),
        ("<THINK>Hm.</Think>Hello.", "Hello."),
        ("<think>Hm.", None),
        ("Hello. <think>Hm.", None),
        ("<think>Hm.</think>", None),
        ("Hm.</think> \n", None),
    ],
)
def test_what_is_said_is_what_is_no_reasoning(text, said):
    assert spoken(text) == said


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, None),
        ("half \ud83d, whole \ud83d\ude00", "half \ufffd, whole \U0001f600"),
        ([], None),
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        (["one ", {"type": "output_text", "text": "two"}], "one two"),
        ([{"type": "thinking", "thinking": [{}]}, {"type": "text", "text": "\ud83d"}], "\ufffd"),
    ],
)
def test_contents_that_are_text(content, text):
    assert text_of(content) == text


@pytest.mark.parametrize(
    "content",
    [7, True, {"text": "x"}, [7], [{"type": "image_url", "image_url": {}}], [{"type": "text", "text": 7}]],
)
def test_contents_that_are_none(content):
    with pytest.raises(ValueError, match="text"):
        text_of(content)
