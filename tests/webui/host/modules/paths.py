import os

models_path = os.environ.get("TOY_MODELS", "models")
