"""The page of `analyze report` in a real browser, opened from its file, without a network."""

import json
from pathlib import Path

from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from mlm_train.analyze.keys.folder import KeysFolder
from tests.analyze.browser import browser
from tests.analyze.random_keys import random_keys
from tests.commands import mlm_train

TEXTS = [f" word{number}" for number in range(200)] + ["</script><b>"]


def row_of(table: WebElement, layer: int) -> WebElement:
    return table.find_element(By.CSS_SELECTOR, f"tr[data-layer='{layer}']")


def names(folder: KeysFolder, token: int) -> list[str]:
    """Number and name of a token's cluster in each layer."""
    found = []
    for layer in folder.layers:
        (labels,) = folder.tensors(layer, "cluster")
        found.append(f"{labels[token]} {folder.statistics(layer).clusters[int(labels[token])].name}")
    return found


def test_a_token_is_found_and_the_layer_changed(tmp_path: Path) -> None:
    folder = random_keys(tmp_path / "keys", TEXTS)
    page = tmp_path / "page.html"
    mlm_train("analyze", "report", "--keys", folder.path, "--output", page)
    with browser() as opened:
        opened.get("about:blank")
        opened.get_log("performance")  # what the browser's first tab asked for
        opened.get(page.as_uri())
        map_ = opened.find_element(By.ID, "map")
        waiting = WebDriverWait(opened, 60)
        waiting.until(lambda _: map_.find_elements(By.CSS_SELECTOR, ".main-svg"))
        search, shown = opened.find_element(By.ID, "search"), opened.find_element(By.ID, "token")
        for text, token in ((" word17", 17), ("</script><b>", 200), ("#3", 3)):
            search.clear()
            search.send_keys(text)
            waiting.until(lambda _, token=token: f"token {token} " in shown.text)
            clusters = [row_of(shown, layer).find_element(By.CLASS_NAME, "cluster").text for layer in (0, 1)]
            assert clusters == names(folder, token)
            (keys,) = folder.tensors(1, "token_keys")
            first = row_of(shown, 1).find_element(By.CLASS_NAME, "keys").text.split()[0].rstrip("*")
            assert int(first) == int(keys[token, 0])
            marked = opened.execute_script("return [...document.getElementById('map').data[1].x]")
            tokens, places = folder.tensors(0, "map_tokens", "map_places")
            assert marked == places[tokens == token, 0].tolist()

        Select(opened.find_element(By.ID, "layer")).select_by_value("1")
        row = opened.find_element(By.CSS_SELECTOR, "#statistics tr.chosen")
        assert [cell.text for cell in row.find_elements(By.TAG_NAME, "td")][:3] == ["1", "1.1250", "10.5000"]
        first = opened.execute_script("return [...document.getElementById('map').data[0].x]")
        assert first == folder.tensors(1, "map_places")[0][:, 0].tolist()
        word = opened.find_elements(By.CSS_SELECTOR, "#clusters .word")[-1]
        title = word.get_attribute("title")
        word.click()
        waiting.until(lambda _: f"{title} " in shown.text)

        assert not opened.find_elements(By.CSS_SELECTOR, "b")  # of a token or a cluster's name
        assert not opened.find_elements(By.CSS_SELECTOR, "[data-title^='Share']")
        assert [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"] == []
        messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
        asked = {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }
        assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {page.as_uri()}
