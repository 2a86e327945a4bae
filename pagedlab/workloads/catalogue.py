"""The published traces that are known by name: where their authors keep them, and what the files' SHA-256 are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A published trace, of one file or several."""

    name: str
    summary: str
    format: str
    """Which reader reads it."""
    licence: str
    repository: str
    """``owner/name`` on GitHub."""
    local: str
    """Where it lies below the folder that PAGEDLAB_DATA names."""
    commit: str | None = None
    """The commit whose files these are; None: it is not fetched."""
    files: tuple[tuple[str, str], ...] = ()
    """(path in the repository, SHA-256) of every file."""

    @property
    def source(self) -> str:
        """The repository's page."""
        return f"https://github.com/{self.repository}"


def _files(pattern: str, table: str) -> tuple[tuple[str, str], ...]:
    """Return (path, SHA-256) for each line of a table that names what stands for the star in ``pattern``."""
    return tuple(
        (pattern.replace("*", stem), sha) for stem, sha in map(str.split, table.strip().splitlines())
    )


_MOONCAKE = "3b5a594133958449a1feaf1c9e0fc1b553e34a28"
_AZURE = "b469a113cedca53ddc3bdea71a143dc4b7d8700c"

DATASETS = (
    Dataset(
        name="mooncake-conversation",
        summary="12,031 requests of an hour of conversations, hashes of 512 tokens.",
        format="mooncake",
        licence="Apache-2.0",
        repository="kvcache-ai/Mooncake",
        local="mooncake/mooncake_conversation_trace.jsonl.gz",
        commit=_MOONCAKE,
        files=(
            (
                "FAST25-release/traces/conversation_trace.jsonl",
                "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
            ),
        ),
    ),
    Dataset(
        name="mooncake-synthetic",
        summary="Mooncake's synthetic mix, hashes of 512 tokens.",
        format="mooncake",
        licence="Apache-2.0",
        repository="kvcache-ai/Mooncake",
        local="mooncake/mooncake_synthetic_trace.jsonl.gz",
        commit=_MOONCAKE,
        files=(
            (
                "FAST25-release/traces/synthetic_trace.jsonl",
                "bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131",
            ),
        ),
    ),
    Dataset(
        name="azure-code",
        summary="8,819 requests of a code completion service in 2023, lengths only.",
        format="azure",
        licence="CC-BY-4.0",
        repository="Azure/AzurePublicDataset",
        local="azure/AzureLLMInferenceTrace_code.csv.gz",
        commit=_AZURE,
        files=(
            (
                "data/AzureLLMInferenceTrace_code.csv",
                "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
            ),
        ),
    ),
    Dataset(
        name="azure-conv",
        summary="19,366 requests of a conversation service in 2023, lengths only.",
        format="azure",
        licence="CC-BY-4.0",
        repository="Azure/AzurePublicDataset",
        local="azure/AzureLLMInferenceTrace_conv.csv.gz",
        commit=_AZURE,
        files=(
            (
                "data/AzureLLMInferenceTrace_conv.csv",
                "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
            ),
        ),
    ),
    Dataset(
        name="arxiv",
        summary="28,257 lengths of papers and their summaries, no times.",
        format="vidur",
        licence="MIT",
        repository="microsoft/vidur",
        local="vidur/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv.gz",
        commit="7d47513363ec447a741ac5e47241580b47724fbf",
        files=(
            (
                "data/processed_traces/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
                "9d3580538d915ca75e4aaaa54590b42dbb17abc6d74c8913310cf07c232adcdc",
            ),
        ),
    ),
    Dataset(
        name="weka",
        summary="40 sessions of coding agents with think times, hashes of 64 tokens.",
        format="weka",
        licence="Apache-2.0",
        repository="callanjfox/kv-cache-tester",
        local="weka",
        commit="94f6046dfd9c0c8bc0cdb24a5aa6579bac8669bf",
        files=_files(
            "traces/trace_*.json",
            """
    0166 06f30eeecde004d42996e079cfd1da22829252d97f1526afd6063e12e709dc35
    0167 edeb38e5d6aca21fdb237599c5a071b57bee11cf84d0f7b6eb32d015d0acd8d6
    0170 2bbb577738688ea1fc7c4ec41fdfe6e1cadc9a3d567c520a5d0b7f165319cb83
    0171 aaf7b2c178e97b4e2ad866d1ec052fb26cb489373352d3d407f8763c2c8d723b
    0172 9d96922f63a7ecc0cd717caaac69fc544b9667050337196949a5da296187af96
    0173 bbbc47a1e415f699bc02b3eb9b68de7cf7aa463fed681927f2391d1729eb84ac
    0175 3be82f0f45e6c38c082311eff819490211900efcd34521e4e39d725dae8088b7
    0179 ec1d9fb3982340fb4ea9d770ba72a6f19c9e588480205fc37bbf3fb6cd818e36
    0181 797322fd1e6130bdcd883b6a7209f7c6ffb8919d8da1081b2aca1eb709285810
    0182 2ce137151e50576a5fa580fca542a37d8054ef19b26bef96ba0934dd712a69e0
    0183 9310124aeda853cfe4be314d5304c62cbec5ba09539a583d1e570074f172f956
    0185 fe24d75fc64c3004ee405eefb9fbd611c1030151bed3cc0f46eb34a1354a9e21
    0186 6540189f69b3a7789693a22691c752b11293805fad517fd313607931ea918016
    0188 48a989f2a4f7e7de741aa991ee9d2752b5571a43c55d2f5e6dd36c7ac370f670
    0190 161f7d0d6ae8f014d376beeec1ab48a6d67d5b70be16de81c81c73737df950ed
    0191 e25d2d9a0c8af2295bfd855bf4d8b73e0634549c88d477698367500897796713
    0193 9fd5dda29e1cbf033fdf17d4bdb98b0821f238890bef3624dea0a4d3ff98b315
    0195 4c7b98d6b8c52a6b6b5d823b3461d474c6ce7a26ff04ef6ed9e2e5b755a59ab9
    0197 764c340fdfb2ab2179b888f8144223932fd89b27e5c907eaad6606b284163518
    0200 e0c1e22da4fb0e33fd892468f589ad7a73d1261d169bb02115b958b9ad37c3ad
    0202 bc97c9eec8978b0440536cca3bd55ba798064e740471145c1d6748d76b129d73
    0205 027d7810851fa0b6b8eed71553f20742cfc128a7c849efda7670e7cad971f41f
    0206 521eb662472811539dc29a94e6600aba363cd9c41ee00075a6a47efce185d1df
    0207 f41b5b4a6d96964e6773880b36c45778527bc4c2336ad972f625b8734b20946b
    0208 abc6d72f05b4e867365e2c4dd441cb81a52aaaf04cbd0c0ecbddc70bf2ef92b3
    0209 1ad37c0be4b32149bcee52da1d5deb50d61d3e19e2f83f4199844c21d3866d06
    0210 9d4fa6b37c0350c494ee48abcab0b7a2d32fbaf5980f671b3f3c9ea6ef722cb9
    0215 88aebc35bc46b8bc0af91697927a879b0cd9af94a798756f6b0e1e837ccf3883
    0216 450b65862153285b82992ff81e60a36c045d81f0cdb459f7260951bdf41094d2
    0217 45abb231ed483b8725736e83566d514c77a2ad2dd32e51079d6b3c485c2d9d16
    0218 3eefde73c9f4faf8343065d5470ae057021f684bee8dd8f6c095ec46082b7ceb
    0219 655781e25e099e562abf8d874c7e82f85e94da0419b30e592995726e77de95b1
    0220 d7c4c6b1258390171fa09a21e973fa0bd0767bbfc03c0acc1b9fbaf0874fdd8d
    0223 fc8da8f60958be7fdfd052155ec04451c2d2656900be9c7527de6b2b2bc3b5c4
    0224 4f2268b905d63452bfcf770ae1ce73ce13b192a5de9a712a081bba443faf0ca0
    0225 c367722b4fd17704e6043e59039b6d93a403327222a2772dc6d36e47d0a61749
    0228 b0b119a372d6ff45f0db39382f03529764dd5fd35d7a3c5386390e03c9bd4b75
    0229 a512eab3fbe24897aee215e82746fadaf8aaf47bcca83a5d8a7d8d353a574969
    0230 6760632d254fe135d20914d828ef6ad2c1c3e4891071e0df799e336e8ddab94b
    0233 019f78ed3489f602dfb9089a886d7c0b15ad05e49d03e08b2f88994f28362b5c
    """,
        ),
    ),
    Dataset(
        name="lmcache-agent",
        summary="402 calls of 20 coding agents with the texts of their prompts.",
        format="lmcache-agent",
        licence="Apache-2.0",
        repository="LMCache/lmcache-agent-trace",
        local="lmcache_agent/miniswe.tar.gz",
        commit="271d1c02f97d68de6b500bcd9c9b25730b1d4b7f",
        files=_files(
            "miniswe/*.jsonl",
            """
    063925220f0d2954505eb37612b11ab3 58a48008ded2d551f55ed9414351c9191ba9ff84b16f65718c07edfeefd10fae
    07c6a78a27294b41a7c09a1907af143d a5fda6361b9402a2beec17a4b99ff5075401ef360193f25ca1a7c0027593dbcd
    0d858f596973e20b4e8a66cc6d7efb8d 421f3242b36f9089f0153b89c0335d8ab7a145e4f0dc7ffedbf269e2238e2fe9
    189f0222310bd8eee310f204e91b9c84 df8e61ad8e072e77858755a5853ad9b6cccebe40a54135636a28d9801f114d45
    2e9e99a583d052783791ec77ebb905a2 b8965283787d03952c9b2864d9ee0cd34283740232852680b541ce1124f052ba
    39f322b016f240b738243a425ddd8049 4ba19873444858a9f7ffbeac08f4d6ab78f7a322410c3eaa5ac7740ff113a396
    5518cbf6b5c90e74800c7cdaf91da2f7 5d8bd7c109f969deb1175b906caf3eb316ce8e952afaf13ebaf3ba6dd0978188
    5a8530b10dedc4c0ab526343f4ddc7ff 66eb668b4c5044497d7183a35d1b30cf57214e82ff8ec2426d15797a15c1ee2a
    5e964bd93f8c35ab4430fd68b91abf13 8640d57a4cd298eeacb593949ede03d1f13f5f53db733fe01742b6f6b166fdf9
    6f1a88fc2fa796cf515b263d8f5f55c4 4452189de9c9f71345b121eb71cec3b6db1ca4b8700c937ddd1acc35892cf21f
    8f7920a28c54ae83dadb6d0a8e6cbd74 518147fe4c6dac47b3921c5fd811fc1c24716dd1a05459514305db4e162d844d
    abe6103153a804525aa167d60cc30912 5ac57367b6430f5c477f289ee022efccfb01c752f41ddc824116d1ba3f71299a
    ae5bc34ffaf6e553cc320e6499db0d47 a679c58ed4ab5ef07e5a0b4063f9e98ab93c3f670f182f8cabe69b461e7c4230
    af281d036d49269c17d2638bed5e5158 b8ccbae2f68c89a2fc25a856e3e9dff01a98f1500956da65f1a978bda5752364
    ba443702286bd3610b74b264aaf2b6a3 9e7ffa3b06fc8f257b4b1e49545797bf66ec5d9d2c58340ebe27bdbdfebbc085
    c7d0fc25aec9ae6e509fb167782bbe54 49b9959b7689b2d26630aa20accaa550d24a738c61d3e935bb83d391a5a9561a
    c9a69aa29bb95747980705c2ac0012cc 653026a8ee3b79e6e9dbadb1c31b8a754fc69346ac5027985d2989186b050f96
    ce5308d303aa2043af2fdc79cf92ff71 77748554f35f8cdd439a21879aa9e3eed9a60f3337333101494143e52ad30d06
    d80534b26b1c83c2c3bcf6be4ca2eb0e b08ad1880f1c5b87d3831e7bb7e2598ed7d8229e5865bc415d8adb58138ced52
    dc4b66869afd786bc4b341ef1119ca53 a4b8174840b4ddffb60524e99969de3ea5d4abb2d1c2e018c8957de390c43568
    """,
        ),
    ),
    Dataset(
        name="sharegpt-llama-3.1-8b",
        summary="300 ShareGPT prompts with answers, as token ids of Llama 3.1.",
        format="llmservingsim",
        licence="MIT",
        repository="casys-kaist/LLMServingSim",
        local="workloads/sharegpt-llama-3.1-8b-300-sps10.jsonl.gz",
    ),
    Dataset(
        name="sharegpt-qwen3-32b",
        summary="300 ShareGPT prompts with answers, as token ids of Qwen3.",
        format="llmservingsim",
        licence="MIT",
        repository="casys-kaist/LLMServingSim",
        local="workloads/sharegpt-qwen3-32b-300-sps10.jsonl.gz",
    ),
)
