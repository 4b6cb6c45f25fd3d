"""The names of ImageNet's classes."""

from ctf.data.imagenet import imagenet_classes, readable_class_names


def test_classes_are_in_the_order_of_their_ids() -> None:
    classes = imagenet_classes()
    assert len(classes) == len({*classes.values()}) == 1000 and sorted(classes) == [*classes]
    assert classes["n01440764"] == "tench" and classes["n02099601"] == "golden retriever"


def test_names_are_readable_if_all_are_ids() -> None:
    assert readable_class_names(("n02099601", "n01440764")) == ("golden retriever", "tench")
    for others in (("n02099601", "cats"), ("nothing",), ("n00000000",)):
        assert readable_class_names(others) == others
