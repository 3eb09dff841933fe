stored = []


def add():
    stored.append(True)


def remove():
    stored.clear()
