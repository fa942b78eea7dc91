from torch import nn

from mnp_fast.module_list import CurrentModules


class Equal(nn.ReLU):
    """All of its kind call themselves equal."""

    def __eq__(self, other):
        return isinstance(other, Equal)

    def __hash__(self):
        return 0


def test_the_same_list_until_a_module_changes():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), Equal()), nn.ReLU())
    modules = CurrentModules(model)
    before = modules.current()
    assert modules.current() is before

    def changed():
        found = modules.current()
        return found is not before and list(map(id, found)) == list(map(id, model.modules()))

    model[0][1] = Equal()
    assert changed()
    model[1].inner = nn.ReLU()
    assert changed()
    del model[0][0]
    assert changed()
