"""Token ids of class names and templates, in CLIP's whole vocabulary and in the recorded compact one."""

import pytest
from recorded import settings, values
from torch import Tensor

from silo.clip.tokens import Vocabulary


def rows(vocabulary: Vocabulary, text: str) -> list[int]:
    ids = [vocabulary.start, *vocabulary.encode(text), vocabulary.end]
    return ids + [0] * (77 - len(ids))


@pytest.mark.parametrize("compact", [False, True])
def test_all_recorded_ids(compact: bool) -> None:
    recorded, about = values("tokens"), settings("tokens")
    vocabulary = Vocabulary(recorded["vocab_ids"].tolist() if compact else None)

    def expected(name: str) -> Tensor:
        return recorded[name if compact else f"{name}_full"]

    names = about["class_names_clean"]
    assert [name.replace("_", " ") for name in about["class_names"]] == names
    for at, name in enumerate(names):
        assert rows(vocabulary, f"X X X X {name}.") == expected("class_tokens")[at].tolist()
        assert rows(vocabulary, f"a photo of a {name}.") == expected("words_class_tokens")[at].tolist()
        for which, template in enumerate(about["templates"]):
            assert rows(vocabulary, template.format(name)) == expected("template_tokens")[which, at].tolist()
        assert len(vocabulary.encode(name)) == int(recorded["class_name_lens"][at])
        assert rows(vocabulary, f"X X X X {name}.").index(vocabulary.end) == int(recorded["class_eot"][at])
    assert rows(vocabulary, "a photo of a") == expected("init_words_tokens")[0].tolist()
