import re
from collections import defaultdict

extra_network_registry = {}
re_extra_net = re.compile(r"<(\w+):([^>]+)>")


def register_extra_network(extra_network):
    extra_network_registry[extra_network.name] = extra_network


class ExtraNetworkParams:
    def __init__(self, items=None):
        self.items = items or []


class ExtraNetwork:
    def __init__(self, name):
        self.name = name

    def activate(self, p, params_list):
        raise NotImplementedError

    def deactivate(self, p):
        raise NotImplementedError


def activate(p, extra_network_data):
    for name, network in extra_network_registry.items():
        network.activate(p, extra_network_data.get(name, []))


def parse_prompt(prompt):
    found = defaultdict(list)

    def take(match):
        found[match[1]].append(ExtraNetworkParams(items=match[2].split(":")))
        return ""

    return re_extra_net.sub(take, prompt), found


def parse_prompts(prompts):
    """Tags of the first prompt alone are handed on."""
    parsed = [parse_prompt(p) for p in prompts]
    return [text for text, _ in parsed], parsed[0][1]
