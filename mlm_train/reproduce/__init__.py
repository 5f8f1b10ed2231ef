"""The paper's tables and figures, measured again at a chosen scale."""
