"""python -m finetune.ask: questions to a model, all at once or in a conversation, with tools that it may call or without."""
