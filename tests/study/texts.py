"""A tiny checkpoint and WordNet-like files: classes that their words tell apart."""

import random

import transformers as tf

WORDS = [f"w{i}" for i in range(40)]


def make_checkpoint(folder):
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tf.BertTokenizer({word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tf.BertModel(tf.BertConfig(vocab_size=len(WORDS) + 5, **sizes)).save_pretrained(folder)
    return folder


def make_wordnet(folder, per_class=200, seed=0):
    """Two classes with enough definitions, and one with too few; some definitions are there twice."""
    folder.mkdir()
    random.seed(seed)
    lines = ["  1 a licence"]
    for label, words, count in (("03", WORDS[:25], per_class), ("04", WORDS[15:], per_class), ("05", WORDS, 5)):
        for _ in range(count):
            gloss = " ".join(random.choices(words, k=random.randint(3, 9)))
            lines.append(f'00001740 {label} n 01 entity 0 001 ~ 00001930 n 0000 | {gloss}; "an example"')
    lines += ["00001740 03 n 01 entity 0 000 | too short", *lines[1:4]]
    (folder / "data.noun").write_text("\n".join(lines) + "\n")
    for name in ("verb", "adj", "adv"):
        (folder / f"data.{name}").write_text("")
    return folder
