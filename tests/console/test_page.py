"""The console in a real browser: what it shows, what it takes, keys, keyboard, screen readers, small screens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import expect

from tests.console.pages import DECISIONS, HOSTILE, Story, open_story, watched
from tests.support.live import live_gateway

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

VIEWS = ("overview", "decisions", "try", "judge", "workers")
LAPTOP = {"width": 1280, "height": 800}
PHONE = {"width": 360, "height": 740}


async def test_it_shows_who_is_asked_and_who_is_right(browser: Any, story: Story) -> None:
    async with watched(browser, story.gateway.url, viewport=LAPTOP) as seen:
        await seen.go("overview")
        matrix = seen.page.get_by_role("region", name="Who is asked for what, and who is right")
        rows = matrix.get_by_role("row")
        await rows.nth(4).wait_for()
        cells = await rows.nth(1).locator("td").all_inner_texts()
        columns = await rows.nth(0).locator("th").all_inner_texts()
        report = story.get("/report")
        assert [column.splitlines()[0] for column in columns[1:]] == [
            "all texts",
            *[kind["kind"] for kind in report["kinds"]],
        ]
        record = report["scorers"][0]
        assert f"{100 * record['accuracy']['value']:.0f} %" in cells[0]
        assert f"asked {100 * record['asked']:.0f} %" in cells[0]
        assert len(report["kinds"]) == 2
        await seen.page.locator("canvas").nth(4).wait_for()
        figures = await seen.page.get_by_role("img").evaluate_all("all => all.map(one => one.ariaLabel)")
        assert all("rm-a" in said for said in figures[:4])
        assert figures[4].startswith("Price per decision. Latest: price 1.00")


async def test_a_decision_appears_without_reloading(browser: Any, story: Story) -> None:
    async with watched(browser, story.gateway.url, viewport=LAPTOP) as seen:
        await seen.go("decisions")
        await seen.page.locator(".decisions li").first.wait_for()
        (reply,) = story.send(f"{HOSTILE} what now?")
        newest = seen.page.locator(f"[data-decision='{reply['decision_id']}']")
        await newest.get_by_role("button").click()
        text = newest.locator("pre").filter(has_text="what now?").first
        assert await text.inner_text() == f"{HOSTILE} what now?"
        beliefs = newest.get_by_role("region", name="Beliefs and draws")
        await expect(beliefs.locator("circle")).to_have_count(3)
        attempts = await newest.get_by_role("region", name="Attempts").inner_text()
        assert reply["model"] in attempts
        assert await seen.page.evaluate("window.hacked") is None


async def test_a_word_moves_the_posterior(browser: Any, story: Story) -> None:
    async with watched(browser, story.gateway.url, viewport=LAPTOP) as seen:
        await seen.go("try")
        page = seen.page
        await page.get_by_label("Prompt").fill(HOSTILE)
        await page.get_by_role("textbox", name="Response 1").fill("short")
        await page.get_by_role("textbox", name="Response 2").fill("<b>longer</b> than the other")
        await page.get_by_role("textbox", name="Response 2").press("Control+Enter")
        verdict = await page.locator(".verdict").inner_text()
        assert "prefers response 2" in verdict
        assert "was the largest, which had a chance of" in verdict
        await expect(page.get_by_role("region", name="What was believed and drawn").locator("circle")).to_have_count(3)
        before = story.get("/posterior")["version"]
        await page.get_by_role("button", name="This one is better").first.click()
        moved = page.get_by_role("region", name="Before and after your word")
        await moved.wait_for()
        assert "has learned from" in await page.locator(".note.good").inner_text()
        assert await page.evaluate("window.hacked") is None
    assert story.get("/posterior")["version"] > before


async def test_a_run_of_rewards_is_told_how_its_rm_did(browser: Any, valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, signal="reward") as gateway:
        async with watched(browser, gateway.url, viewport=LAPTOP) as seen:
            await seen.go("try")
            await seen.page.get_by_role("button", name="Ask for rewards").click()
            await seen.page.get_by_role("button", name="Badly").click()
            await seen.page.get_by_role("region", name="Before and after your word").wait_for()
            await expect(seen.page.get_by_role("button", name="This one is better")).to_have_count(0)
        assert gateway.posterior()["models"][0]["mean_reward"] in (0.0, None)
        assert gateway.posterior()["version"] == 1


async def test_another_run_can_be_chosen(browser: Any, story: Story) -> None:
    other = f"{story.gateway.run}-other"
    story.send("one more", run=other)
    async with watched(browser, story.gateway.url, viewport=LAPTOP) as seen:
        await seen.go("overview")
        await seen.page.get_by_label("Run").select_option(other)
        await seen.page.locator("footer").filter(has_text=f"run {other}").wait_for()
        assert await seen.page.locator(".tile").first.locator("b").inner_text() == "1"


async def test_whom_it_would_ask_costs_no_call(browser: Any, story: Story) -> None:
    async with watched(browser, story.gateway.url, viewport=LAPTOP) as seen:
        await seen.go("try")
        await seen.page.get_by_label("Prompt").fill("asked of nobody")
        await seen.page.get_by_role("button", name="Whom would it ask?").click()
        table = seen.page.get_by_role("region", name="nobody was asked")
        await expect(table.get_by_role("row")).to_have_count(4)
    asked = [prompt for arm in story.gateway.arms for items in arm.calls for prompt, _ in items]
    assert asked
    assert "asked of nobody" not in asked


async def test_a_person_judges_blind_by_keyboard(browser: Any, story: Story) -> None:
    async with watched(browser, story.gateway.url, viewport=LAPTOP) as seen:
        await seen.go("judge")
        page = seen.page
        first = page.locator(".response pre").first
        chosen, prompt = await first.inner_text(), await page.locator(".audit > .text pre").first.inner_text()
        shown = await page.locator("main").inner_text()
        assert "rm-" not in shown
        await page.keyboard.press("1")
        await page.locator(".note.good").wait_for()
        revealed = await page.locator(".note.good").inner_text()
        assert "Your judgement, response 1, is in the log. rm-c, the referee, had said response" in revealed
        assert await page.evaluate("document.activeElement.textContent") == "Judge audits"
    (judged,) = [one for one in story.get("/audits?count=200") if one["prompt"] == prompt and one["judged"]]
    assert judged["responses"][judged["judged_preferred"]] == chosen


async def test_every_view_can_be_reached_by_keyboard(browser: Any, story: Story) -> None:
    async with watched(browser, story.gateway.url, viewport=LAPTOP) as seen:
        await seen.go("overview")
        page = seen.page
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.className") == "skip"
        for view in VIEWS[1:]:
            await page.get_by_role("navigation").get_by_role("link").first.focus()
            for _ in range(VIEWS.index(view)):
                await page.keyboard.press("Tab")
            await page.keyboard.press("Enter")
            await page.locator(f"a[href='#{view}'][aria-current='page']").wait_for()
            await page.locator("main:focus").wait_for()
        await seen.go("decisions")
        line = page.locator(".decisions button").first
        await line.focus()
        await page.keyboard.press("Space")
        await expect(line).to_have_attribute("aria-expanded", "true")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_serious(browser: Any, story: Story, scheme: str) -> None:
    async with watched(browser, story.gateway.url, viewport=LAPTOP, color_scheme=scheme) as seen:
        for view in VIEWS:
            await seen.go(view)
            await seen.page.locator("main section, main dl").first.wait_for()
            if view == "decisions":
                await seen.page.locator(".decisions button").first.click()
            if view == "try":
                await seen.page.get_by_role("button", name="Ask for rewards").click()
                await seen.page.locator(".verdict").wait_for()
            assert await seen.serious() == [], view


async def test_a_phone_needs_no_sideways_scrolling(browser: Any, story: Story) -> None:
    async with watched(browser, story.gateway.url, viewport=PHONE, has_touch=True) as seen:
        for view in VIEWS:
            await seen.go(view)
            await seen.page.locator("main section").first.wait_for()
            if view == "decisions":
                await seen.page.locator(".decisions button").first.click()
            assert await seen.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"], view


async def test_the_colours_that_were_chosen_stay(browser: Any, story: Story) -> None:
    async with watched(browser, story.gateway.url, viewport=LAPTOP, color_scheme="light") as seen:
        await seen.go("workers")
        background = "getComputedStyle(document.body).backgroundColor"
        light = await seen.page.evaluate(background)
        await seen.page.get_by_label("Colours").select_option("dark")
        dark = await seen.page.evaluate(background)
        assert dark != light
        await seen.page.reload()
        await seen.page.wait_for_selector(".link.live")
        assert await seen.page.evaluate(background) == dark


async def test_the_page_asks_for_the_key_and_keeps_it_in_the_tab(browser: Any, valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, api_keys=("right",)) as gateway:
        context = await browser.new_context(viewport=LAPTOP)
        page = await context.new_page()
        await page.goto(gateway.url)
        field = page.get_by_label("API key")
        await field.fill("wrong")
        await field.press("Enter")
        await page.get_by_role("alert").filter(has_text="API key missing or wrong").wait_for()
        await page.get_by_label("API key").fill("right")
        await page.get_by_role("button", name="Open").click()
        await page.wait_for_selector(".link.live")
        stored = "JSON.stringify([Object.values(sessionStorage), Object.values(localStorage), document.cookie])"
        assert await page.evaluate(stored) == '[["right"],[],""]'
        await page.get_by_role("link", name="Try it").click()
        await page.get_by_role("button", name="Ask for rewards").click()
        await page.locator(".verdict").wait_for()
        await page.get_by_role("button", name="Forget key").click()
        await page.get_by_label("API key").wait_for()
        await context.close()


async def test_a_gateway_that_goes_away_is_told(browser: Any, valkey_server: ValkeyProcess, caplog: Any) -> None:
    context = await browser.new_context(viewport=LAPTOP)
    page = await context.new_page()
    with open_story(valkey_server.url) as other:
        await page.goto(other.gateway.url)
        await page.wait_for_selector(".link.live")
    # The stream did not hold up the gateway's end.
    assert not [one for one in caplog.messages if "graceful shutdown exceeded" in one]
    await page.get_by_role("alert").filter(has_text="Not connected").wait_for()
    await expect(page.get_by_text(f"{DECISIONS}", exact=True).first).to_be_visible()
    await context.close()
