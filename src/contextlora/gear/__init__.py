"""ContextGear: plan and run training along the task graph on a few unequal devices (SEMANTICS section 3)."""
