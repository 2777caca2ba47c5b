"""Is a name a path on this machine or a repository on the Hub? ``unified_tokenizers`` answers, for it needs this too."""

from unified_tokenizers.hub import check_config, expanded, local_folder, local_path, on_the_hub

__all__ = ["check_config", "expanded", "local_folder", "local_path", "on_the_hub"]
