() => {
  const all = (what) => [...document.querySelectorAll(what)], wrong = [], ids = all('[id]').map((e) => e.id);
  const check = (holds, what, e) => holds || wrong.push(what + ': ' + (e ? e.outerHTML.slice(0, 90) : ''));
  check(document.documentElement.lang, 'no language');
  ['h1', 'main', 'header', 'nav[aria-label]'].forEach((what) => check(all(what).length === 1, 'landmarks', all(what)[1]));
  check(new Set(ids).size === ids.length, 'an id twice');
  all('img').forEach((e) => check(e.alt, 'no alt', e));
  all('svg').forEach((e) => check(e.getAttribute('aria-hidden') || e.getAttribute('aria-label'), 'a chart without words', e));
  all('svg text').filter((e) => e.checkVisibility()).forEach((e) => {
    const box = e.getBBox(), frame = e.ownerSVGElement.viewBox.baseVal;
    const [right, foot] = [box.x + box.width, box.y + box.height];
    check(box.x >= 0 && box.y >= 0 && right <= frame.width && foot <= frame.height, 'text outside of its chart', e);
  });
  all('input, select').forEach((e) => check([...e.labels].some((l) => l.innerText.trim()), 'no label', e));
  all('input[type=range]').forEach((e) => check(e.getAttribute('aria-valuetext'), 'no value in words', e));
  all('th').forEach((e) => check(e.scope && e.textContent.trim(), 'no scope', e));
  all('a[href]').forEach((e) => check(ids.includes(e.getAttribute('href').slice(1)), 'a link to nowhere', e));
  all('[aria-labelledby]').forEach((e) => check(ids.includes(e.getAttribute('aria-labelledby')), 'no name', e));
  all('.wide, pre').forEach((e) => check(e.tabIndex === 0, 'scrolls by mouse only', e));
  all('h1, h2, h3, h4').reduce((last, e) => (check(+e.tagName[1] <= last + 1, 'a level left out', e), +e.tagName[1]), 0);
  return wrong;
}
