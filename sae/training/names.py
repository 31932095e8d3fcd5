"""What other trainers call our fields."""

TRAINING_ARGUMENTS = {
    "output_dir": "run_dir",
    "run_name": "name",
    "max_steps": "tokens",
    "num_train_epochs": "tokens",
    "per_device_train_batch_size": "batch_tokens",
    "gradient_accumulation_steps": "micro_batch_tokens",
    "learning_rate": "optim.lr",
    "warmup_steps": "optim.warmup_share",
    "warmup_ratio": "optim.warmup_share",
    "lr_scheduler_type": "optim.decay_share",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip_norm",
    "bf16": "precision",
    "logging_steps": "log.every_steps",
    "report_to": "log.tracker",
    "project": "log.project",
    "save_steps": "checkpoints.every_steps",
    "save_total_limit": "checkpoints.keep",
    "eval_steps": "eval.every_steps",
}
"""By the name in transformers' TrainingArguments: typed in a config, that is refused with ours."""
